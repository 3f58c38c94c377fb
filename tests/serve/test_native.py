"""Rows on our own runtime, without an engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rheostat.meter import Meter
from rheostat.serve import native
from rheostat.serve.backend import Join, Row, make_backend
from rheostat.serve.native import NativeBackend
from tests.serve.conftest import Tiny


@pytest.fixture
def backend(tiny: Tiny) -> NativeBackend:
    found = make_backend(tiny.adapted, "native")
    assert isinstance(found, NativeBackend)
    return found


def row(*prompt: int) -> Row:
    return Row(list(prompt), Meter(keep_passes=False))


def test_a_step_of_all_rows_is_each_rows_own_whatever_their_order(tiny: Tiny, backend: NativeBackend):
    rows, computes = [row(5, 6), row(7, 8, 9), row(10)], [1.0, 0.75, 0.8]
    backend.join([Join([one], compute) for one, compute in zip(rows, computes, strict=True)])
    backend.step(rows[::-1], [30, 31, 32], computes[::-1])
    for one, token, compute in zip(rows, [32, 31, 30], computes, strict=True):
        other = make_backend(tiny.adapted, "native")
        alone = row(*one.prompt)
        other.join([Join([alone], compute)])
        other.step([alone], [token], [compute])
        torch.testing.assert_close(one.logits, alone.logits)
        assert one.layers == alone.layers


def test_held_rows_among_others_are_steered_as_alone(tiny: Tiny, backend: NativeBackend):
    asks = [((5, 6), 0.8, True), ((7, 8, 9), 0.75, False), ((10,), 0.75, True), ((11, 12), 1.0, True)]
    computes = [compute for _, compute, _ in asks]
    rows = [row(*prompt) for prompt, _, _ in asks]
    backend.join([Join([one], compute, held) for one, (_, compute, held) in zip(rows, asks, strict=True)])
    tokens = [[30 + 7 * k + place for place in range(4)] for k in range(12)]
    for step in tokens:
        backend.step(rows, step, computes)
    backend.leave(rows[0])  # the last takes its place
    backend.step(rows[:0:-1], tokens[0][:0:-1], computes[:0:-1])
    for place, (one, (prompt, compute, held)) in enumerate(zip(rows, asks, strict=True)):
        other, alone = make_backend(tiny.adapted, "native"), row(*prompt)
        other.join([Join([alone], compute, held)])
        for step in tokens if place == 0 else [*tokens, tokens[0]]:
            other.step([alone], [step[place]], [compute])
        torch.testing.assert_close(one.logits, alone.logits)
        assert one.layers == alone.layers
        if place:
            assert one.state.past == alone.state.past
            assert (one.state.past is not None) == held


def test_answers_of_one_prompt_have_accounts_of_their_own(backend: NativeBackend):
    rows = [row(5, 6, 7), row(5, 6, 7)]
    backend.join([Join(rows, 0.75, True)])
    first, second = (one.state.past for one in rows)
    assert first == second
    backend.step([rows[1]], [30], [0.75])
    assert (first.tokens, second.tokens) == (3, 4)


def test_a_step_that_fails_is_on_no_account(backend: NativeBackend, monkeypatch: pytest.MonkeyPatch):
    one = row(5, 6)
    backend.join([Join([one], 0.75, True)])
    before = replace(one.state.past)
    monkeypatch.setattr(backend.runtime, "saved", lambda experts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend.step([one], [30], [0.75])
    assert one.state.past == before


def test_one_row_may_step_while_the_others_wait(backend: NativeBackend):
    rows = [row(5, 6), row(7, 8, 9)]
    backend.join([Join([one], 1.0) for one in rows])
    waits = rows[0].logits.clone()
    backend.step([rows[1]], [30], [0.75])
    assert torch.equal(rows[0].logits, waits)
    assert backend.cache.lengths.tolist() == [2, 4]
    with pytest.raises(AssertionError, match="all rows or one"):
        backend.join([Join([row(3)], 1.0)])
        backend.step(rows, [1, 2], [1.0, 1.0])


def test_pieces_leave_what_a_prompt_read_at_once_leaves(backend: NativeBackend):
    whole, pieces = row(*range(5, 25)), row(*range(5, 25))
    backend.join([Join([whole], 0.75)])
    join = Join([pieces], 0.75)
    for start, stop in ((0, 7), (7, 19), (19, 20)):
        backend.read(join, start, stop)
    torch.testing.assert_close(pieces.logits, whole.logits)
    torch.testing.assert_close(backend.cache.keys[:, 1, :, :20], backend.cache.keys[:, 0, :, :20])
    assert pieces.meter.cost == whole.meter.cost
    assert pieces.layers == whole.layers


def test_a_prompt_that_is_given_up_between_its_pieces_is_billed_so_far(backend: NativeBackend):
    one = row(*range(5, 25))
    join = Join([one], 0.75)
    backend.read(join, 0, 8)
    backend.leave(one)
    begun = row(*range(5, 13))
    backend.join([Join([begun], 0.75)])
    assert one.meter.cost.flops.total > 0
    assert one.meter.tokens == begun.meter.tokens == 8
    assert backend.cache.lengths.tolist() == [8]  # of the other alone


def test_steps_are_billed_now_and_then_and_at_the_end(backend: NativeBackend, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "BILL_EVERY", 3)
    one = row(5, 6)
    backend.join([Join([one], 1.0)])
    seen = []
    for place in range(5):
        backend.step([one], [30 + place], [1.0 if place % 2 else 0.75])
        seen.append(one.meter.tokens)
    assert seen == [2, 2, 5, 5, 5]
    backend.leave(one)
    assert one.meter.tokens == 7


def test_what_a_row_owes_sets_its_next_price(tiny: Tiny, backend: NativeBackend, monkeypatch: pytest.MonkeyPatch):
    rows, given = [row(5, 6), row(7, 8)], []
    backend.join([Join([rows[0]], 0.8, True), Join([rows[1]], 0.8, False)])
    take = backend.runtime.step
    monkeypatch.setattr(backend.runtime, "step", lambda *args: given.append(args[3]) or take(*args))
    rows[0].state.past.balance = -1e9
    backend.step(rows, [30, 31], [0.8, 0.8])
    table = tiny.adapted.table
    assert given[0].tolist() == pytest.approx([table.settings[-1], table.native(0.8)])
    assert rows[0].state.past.tokens == 3
