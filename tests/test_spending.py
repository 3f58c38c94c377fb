"""What may be asked, and who sees it."""

from __future__ import annotations

import contextvars
import threading
from pathlib import Path

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.spending import Pass, current_pass, current_spending, enter_pass, replay, spend

BAD = [0, 0.0, -0.1, 1.5, float("nan"), float("inf"), "x", None, [], (), [0.5, 0], [0.5, None], [[0.5]]]
BAD += [{"prefill": 0}, {"decode": "x"}, torch.tensor([]), torch.tensor([0.5, 2.0]), Path()]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_a_bad_compute_is_refused_by_name_in_one_line(value):
    with pytest.raises(SettingError, match=r"^compute=.*must be a number in \(0, 1\], or one a row$"), spend(value):
        pass
    assert current_spending() is None


def test_an_unknown_phase_is_refused():
    with pytest.raises(SettingError, match="compute='draft': must be .* prefill and decode"), spend({"draft": 0.5}):
        pass


@pytest.mark.parametrize("value", [0.5, [0.5], (0.5,), torch.tensor(0.5), torch.tensor([[0.5]]), {"prefill": 0.5}])
def test_every_form_of_one_number(value):
    with spend(value):
        assert current_spending().rows("prefill", 3) == (0.5, 0.5, 0.5)


def test_a_phase_left_out_runs_dense():
    with spend({"decode": [0.5, 0.75]}):
        assert current_spending().rows("prefill", 2) == (1.0, 1.0)
        assert current_spending().rows("decode", 2) == (0.5, 0.75)


def test_beams_of_a_request_share_its_entry():
    with spend(torch.tensor([0.5, 0.75])):
        assert current_spending().rows("decode", 6) == (0.5, 0.5, 0.5, 0.75, 0.75, 0.75)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_entries_that_do_not_fit_the_rows_are_refused(num_rows):
    with spend([0.5, 0.75]), pytest.raises(SettingError, match=rf"compute=.*the batch has {num_rows} rows"):
        current_spending().rows("prefill", num_rows)


def test_blocks_nest_and_end_after_an_error():
    with spend(0.5) as outer:
        with spend(0.25, meter=outer) as inner:
            assert inner is outer
            assert current_spending().prefill == (0.25,)
        with spend(0.75) as another:
            assert another is not outer
        assert current_spending().prefill == (0.5,)
        with pytest.raises(KeyError), spend(0.1):
            raise KeyError
        assert current_spending().prefill == (0.5,)
    assert current_spending() is None


def test_threads_do_not_see_each_other():
    seen = {}
    inside = threading.Barrier(2, timeout=120)

    def work(compute: float) -> None:
        seen[f"start {compute}"] = current_spending()
        with spend(compute):
            inside.wait()  # both are in their blocks now
            seen[compute] = current_spending().prefill

    with spend(0.9):
        threads = [threading.Thread(target=work, args=(compute,)) for compute in (0.3, 0.6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert current_spending().prefill == (0.9,)
    assert seen == {"start 0.3": None, "start 0.6": None, 0.3: (0.3,), 0.6: (0.6,)}


def test_replay_puts_back_what_was_in_force_and_bills_nobody():
    one = Pass("prefill", torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool), {})
    other = Pass("decode", one.valid, one.first, {})

    def work() -> None:
        with spend(0.5) as meter:
            enter_pass(one)
            again = replay(current_spending(), current_pass())
        enter_pass(other)
        with again:
            assert current_pass() is one
            assert current_spending().prefill == (0.5,)
            assert current_spending().meter is not meter
        assert current_pass() is other
        assert current_spending() is None

    contextvars.copy_context().run(work)
