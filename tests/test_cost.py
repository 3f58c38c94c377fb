"""Costs are exact integers, checked against counting one by one and against a published model's sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rheostat.cost import (
    Cost,
    Parts,
    attended,
    attention_cost,
    decode_cost,
    dense_cost,
    ffn_cost,
    head_cost,
    prediction_cost,
    router_cost,
    rows_cost,
    seen,
)
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
    assert cost.bytes.flat == 2 * weights + 2 * 576  # and one row of the embedding matrix
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
        embeddings=10 * 576 * 4,
    )


def test_windows_bound_what_attention_reads():
    cost = attention_cost(SMALL, 6, 3, itemsize=2)
    pairs = attended(6, 3) + attended(6, 3, 4) + attended(6, 3, 2)
    assert cost.flops.scores == 4 * 2 * 4 * pairs
    # Layers read the keys that any of the six sees: all nine, three old ones, one old one; and write six each.
    assert cost.bytes.scores == (9 + (3 + 6) + (1 + 6) + 3 * 6) * (2 * 1 * 4) * 2
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
        "attention": 0, "scores": 0, "ffn": 0, "router": 0, "head": 4, "embeddings": 0, "auxiliary": 0, "draft": 0,
    }  # fmt: skip


@given(num_tokens=st.integers(0, 12), past=st.integers(0, 12), window=st.integers(0, 15))
def test_seen_keys_are_those_of_the_union(num_tokens, past, window):
    queries = range(past, past + num_tokens)
    wanted = {key for query in queries for key in range(query + 1) if not window or query - key < window}
    assert seen(num_tokens, past, window) == len(wanted)


def test_rows_share_the_weights_and_nothing_else():
    one = dense_cost(SMALL, num_tokens=3, past=2, num_logits=1, itemsize=2)
    four = dense_cost(SMALL, num_tokens=3, past=2, num_logits=1, itemsize=2, num_rows=4)
    assert four.flops == one.flops.times(4)
    for part in ("attention", "ffn", "head"):
        assert getattr(four.bytes, part) == getattr(one.bytes, part) > 0
    for part in ("scores", "embeddings"):
        assert getattr(four.bytes, part) == 4 * getattr(one.bytes, part) > 0


def test_decoding_is_pass_after_pass():
    whole = decode_cost(SMALL, num_steps=3, past=5, itemsize=2, num_rows=2)
    steps = [dense_cost(SMALL, num_tokens=1, past=past, num_logits=1, itemsize=2, num_rows=2) for past in (5, 6, 7)]
    assert whole == steps[0] + steps[1] + steps[2]
    assert decode_cost(SMALL, num_steps=0, past=5, itemsize=2) == Cost()


def test_a_side_pass_goes_to_one_part_and_keeps_its_scores():
    cost = dense_cost(SMALL, num_tokens=3, past=2, num_logits=1, itemsize=2)
    for part in ("auxiliary", "draft"):
        side = cost.charged_to(part)
        assert side.flops == Parts(**{part: cost.flops.flat, "scores": cost.flops.scores})
        assert side.bytes == Parts(**{part: cost.bytes.flat, "scores": cost.bytes.scores})
        assert (side.flops.flat, side.bytes.total) == (cost.flops.flat, cost.bytes.total)


def test_routers():
    assert router_cost(50, 3, 2) == Cost(flops=Parts(router=300), bytes=Parts(router=100))


def test_rows_of_several_lengths_share_the_reading_of_weights():
    one, other = (
        dense_cost(SMALL, num_tokens=new, past=past, num_logits=0, itemsize=2) for past, new in ((0, 4), (7, 2))
    )
    weights = dense_cost(SMALL, num_tokens=0, past=0, num_logits=0, itemsize=2)
    counts = [(0, 4), (7, 2), (0, 4)]
    assert rows_cost(SMALL, counts, SMALL.num_layers, 2) == one.times(2) + other + weights.times(-2)
    assert rows_cost(SMALL, counts, 0, 2).flops.ffn == 0


def test_predicted_layers():
    cost = prediction_cost(SMALL, 3, 50, 10, 2)
    assert cost.flops == Parts(auxiliary=2 * 50 * 10)
    assert cost.bytes == Parts(auxiliary=2 * 50, scores=3 * SMALL.kv_values * 10 * 2)
