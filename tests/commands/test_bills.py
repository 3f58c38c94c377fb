"""Bills: the figures are the meter's, and what there is none of is left out."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.commands.bills import asked, make_bill, show_bill
from rheostat.spending import spend
from tests.tiny import tiny_model, tiny_windows

PHASES = {"prefill": 0.8, "decode": 1.0}


@pytest.fixture(scope="module")
def meter():
    adapted = Adapted(tiny_model())
    with spend() as found, torch.inference_mode():
        adapted.generate(tiny_windows(1, 8), max_new_tokens=3, do_sample=False)
    return found


def test_the_first_token_has_a_time_of_its_own(meter):
    bill = make_bill(meter, 8, [0.5, 0.01, 0.03])
    assert bill["first_token_ms"] == 500
    assert bill["ms_per_token"] == pytest.approx(20)
    assert bill["new_tokens"] == 3
    assert bill["flops"] == sum(bill["cost"]["flops"].values())
    assert make_bill(meter, 8, [0.5])["ms_per_token"] is None


def test_what_was_not_measured_is_not_shown(meter, capsys):
    answer = {"bill": make_bill(meter, 8, [0.5]), "asked": PHASES, "runtime": "native fp32"}
    show_bill(answer)
    out = capsys.readouterr().out
    assert "8 in, 1 out" in out
    assert "ms a token" not in out
    assert "drafts" not in out
    assert "(native fp32)" in out
    assert "0.8 for the prompt and 1 for the answer asked" in out


@pytest.mark.parametrize(
    ("phases", "words"), [(PHASES, "0.8 for the prompt and 1 for the answer"), ({"prefill": 0.7, "decode": 0.7}, "0.7")]
)
def test_one_number_where_phases_agree(phases, words):
    assert asked(phases) == words
