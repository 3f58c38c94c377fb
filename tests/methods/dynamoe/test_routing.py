"""One dial for all tokens: turning it up never widens anyone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rheostat.methods.dynamoe.routing import Router, choose_by_confidence, choose_by_damage

SHARES = torch.tensor([0.25, 0.5, 0.75, 1.0])
scores = arrays("float32", (5, 3), elements=st.floats(-30, 10, width=32))
logits = arrays("float32", (5, 4), elements=st.floats(-20, 20, width=32))
dials = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2)


def by_damage(log_damage: torch.Tensor, price: float) -> torch.Tensor:
    return choose_by_damage(log_damage, torch.full((len(log_damage),), price), SHARES)


def by_confidence(class_logits: torch.Tensor, slack: float) -> torch.Tensor:
    return choose_by_confidence(class_logits, torch.full((len(class_logits),), slack))


@given(scores, dials)
def test_a_higher_price_never_widens_a_token(log_damage, prices):
    low, high = sorted(prices)
    log_damage = torch.from_numpy(log_damage)
    assert bool((by_damage(log_damage, 1e4 * high) <= by_damage(log_damage, 1e4 * low)).all())


@given(logits, dials)
def test_more_slack_never_widens_a_token(class_logits, slacks):
    low, high = sorted(slacks)
    class_logits = torch.from_numpy(class_logits)
    assert bool((by_confidence(class_logits, high) <= by_confidence(class_logits, low)).all())


@given(scores)
def test_the_ends_of_the_price(log_damage):
    log_damage = torch.from_numpy(log_damage)
    assert bool((by_damage(log_damage, 0.0) == 3).all())
    assert bool((by_damage(log_damage, 1e9) == 0).all())


@given(logits)
def test_the_ends_of_the_slack(class_logits):
    class_logits = torch.from_numpy(class_logits)
    assert bool((by_confidence(class_logits, 0.0) == 3).all())
    assert bool((by_confidence(class_logits, 1.0) == 0).all())


def test_the_choice_is_the_least_damage_plus_price():
    damage = torch.tensor([[0.3, 0.2, 0.01]])
    # Costs at price 0.4 are 0.1, 0.2, 0.3 and 0.4 above the damage.
    assert by_damage(damage.log(), 0.4).tolist() == [2]
    assert by_damage(damage.log(), 0.03).tolist() == [3]
    assert by_damage(damage.log(), 4.0).tolist() == [0]


def test_a_tie_goes_to_the_larger_expert():
    damage = torch.tensor([[0.75, 0.5, 0.25]])  # with price 1 all four cost 1
    assert by_damage(damage.log(), 1.0).tolist() == [3]
    damage = torch.tensor([[0.5, 0.25, 9.0]])
    assert by_damage(damage.log(), 1.0).tolist() == [1]


def test_confidence_takes_the_smallest_that_suffices():
    class_logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    slacks = {0.55: 0, 0.45: 1, 0.25: 1, 0.15: 2, 0.01: 3}
    assert {slack: int(by_confidence(class_logits, slack)) for slack in slacks} == slacks


def test_rows_have_their_own_dials():
    log_damage = torch.tensor([[0.3, 0.2, 0.01]]).log().expand(3, 3)
    assert choose_by_damage(log_damage, torch.tensor([0.4, 0.0, 4.0]), SHARES).tolist() == [2, 3, 0]
    class_logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(3, 4)
    assert choose_by_confidence(class_logits, torch.tensor([0.55, 0.0, 0.15])).tolist() == [0, 3, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_router_foresees_the_same_for_all_in_float32(dtype):
    router = Router(6, 4, 3).to(dtype)
    out = router(torch.randn(5, 6).to(dtype))
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.zeros(5, 3))
    assert router.num_weights == 6 * 4 + 4 * 3
