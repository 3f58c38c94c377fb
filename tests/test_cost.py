"""Costs are exact integers, checked against counting one by one and against a published model's sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rheostat.cost import Cost, Parts, attended, attention_cost, dense_cost, ffn_cost, head_cost
from rheostat.geometry import Geometry
from tests.tiny import SMOLLM2

SMALL = Geometry(
    num_layers=3,
    hidden_size=8,
    ffn_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=11,
    is_tied=False,
    windows=(0, 4, 2),
)


@given(num_tokens=st.integers(0, 40), past=st.integers(0, 40), window=st.integers(0, 50))
def test_attended_pairs_are_those_counted_one_by_one(num_tokens, past, window):
    seen = [past + 1 + i for i in range(num_tokens)]
    wanted = sum(min(keys, window) if window else keys for keys in seen)
    assert attended(num_tokens, past, window) == wanted


def test_smollm2_has_the_flops_of_its_weights():
    attention = 2 * 576 * 576 + 2 * 576 * 192
    weights = 30 * (attention + 3 * 576 * 1536) + 576 * 49152
    assert weights == 134_479_872
    assert SMOLLM2.token_flops == 2 * weights
    cost = dense_cost(SMOLLM2, num_tokens=1, past=0, num_logits=1, itemsize=2)
    assert cost.flops.flat == 2 * weights
    assert cost.bytes.flat == 2 * weights
    assert cost.flops.scores == 30 * 4 * 9 * 64
    assert cost.flops.ffn / cost.flops.flat == pytest.approx(0.592, abs=1e-3)


def test_dense_cost_by_part():
    cost = dense_cost(SMOLLM2, num_tokens=10, past=7, num_logits=1, itemsize=4)
    pairs = sum(range(8, 18))
    assert cost.flops == Parts(
        attention=10 * 2 * 30 * 884_736,
        scores=30 * 4 * 576 * pairs,
        ffn=10 * 2 * 30 * 3 * 576 * 1536,
        head=2 * 576 * 49152,
    )
    cache = 30 * 2 * 3 * 64 * 4  # bytes of one token's keys and values
    assert cost.bytes == Parts(
        attention=30 * 884_736 * 4,
        scores=cache * (17 + 10),  # all are read, the new ones written
        ffn=30 * 3 * 576 * 1536 * 4,
        head=576 * 49152 * 4,
    )


def test_windows_bound_what_attention_reads():
    cost = attention_cost(SMALL, 6, 3, itemsize=2)
    pairs = attended(6, 3) + attended(6, 3, 4) + attended(6, 3, 2)
    assert cost.flops.scores == 4 * 2 * 4 * pairs
    assert cost.bytes.scores == (9 + 4 + 2 + 3 * 6) * (2 * 1 * 4) * 2
    assert cost.bytes.attention == 0


def test_no_logits_leave_the_head_out():
    cost = dense_cost(SMALL, num_tokens=5, past=0, num_logits=0, itemsize=2)
    assert cost.flops.head == cost.bytes.head == 0
    assert cost + head_cost(SMALL, 2, 2) == dense_cost(SMALL, num_tokens=5, past=0, num_logits=2, itemsize=2)


def test_weights_are_read_once_a_pass_and_multiplied_once_a_token():
    one, ten = ffn_cost(SMALL, 1, 3, 2), ffn_cost(SMALL, 10, 3, 2)
    assert ten.flops.ffn == 10 * one.flops.ffn
    assert ten.bytes == one.bytes


def test_costs_add_and_become_plain_types():
    one = Cost(flops=Parts(ffn=3, scores=1, draft=5), bytes=Parts(head=2))
    two = one + one
    assert two.flops.total == 18
    assert two.flops.flat == 16
    assert two.to_dict()["bytes"] == {
        "attention": 0, "scores": 0, "ffn": 0, "router": 0, "head": 4, "auxiliary": 0, "draft": 0,
    }  # fmt: skip
