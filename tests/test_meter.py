"""The meter's own sums; that the model fills it rightly is shown in `tests/test_counted.py` and in the contract."""

from __future__ import annotations

import pytest
import torch

from rheostat.cost import Cost, Parts
from rheostat.errors import SettingError
from rheostat.meter import Meter


def filled(keep_passes: bool = True) -> Meter:
    """A prompt of three tokens (one row has one of padding), then a step; two layers of ten channels."""
    meter = Meter(keep_passes=keep_passes)
    valid = torch.tensor([[True, True, True], [False, True, True]])
    meter.open_pass("prefill", valid, num_layers=2, ffn_size=10)
    meter.widths(torch.tensor([[10, 5, 5], [0, 10, 5]]))
    meter.widths(torch.tensor([[10, 10, 5], [0, 10, 10]]))
    meter.experts(0, torch.tensor([3, 2]), torch.tensor([5, 10]))
    meter.open_pass("decode", torch.ones(2, 1, dtype=torch.bool), num_layers=2, ffn_size=10)
    meter.widths(torch.tensor([[5], [20]]))
    meter.experts(0, torch.tensor([1, 1]), torch.tensor([5, 10]))
    return meter


def test_a_new_meter_spent_nothing_and_says_dense():
    meter = Meter()
    assert meter.tokens == 0
    assert meter.compute == meter.compute_with_context == meter.ffn_fraction == 1.0
    assert meter.token_fractions() == []
    assert meter.layer_fractions() == []


def test_tokens_leave_padding_out():
    meter = filled()
    assert (meter.num_prefill_tokens, meter.num_decode_tokens, meter.tokens) == (5, 2, 7)


def test_token_fractions_follow_the_row_and_skip_padding():
    meter = filled()
    assert meter.token_fractions(0) == [1.0, 0.75, 0.5, 0.25]
    assert meter.token_fractions(1) == [1.0, 0.75, 1.0]


def test_only_the_newest_pass_is_kept_when_asked():
    meter = filled(keep_passes=False)
    assert len(meter.passes) == 1
    assert meter.token_fractions(1) == [1.0]
    assert meter.tokens == 7


def test_layer_fractions_sum_over_passes():
    meter = filled()
    assert meter.expert_counts[0].tolist() == [4, 3]
    assert meter.layer_fractions() == pytest.approx([(4 * 5 + 3 * 10) / 70])


def test_compute_is_the_share_of_the_flat_flops():
    meter = Meter()
    meter.bill(Cost(flops=Parts(attention=10, scores=40)))
    meter.add("ffn", 5, 0, 20, 0)
    meter.add("router", 1, 0, 0, 0)
    assert meter.compute == pytest.approx(16 / 30)
    assert meter.compute_with_context == pytest.approx(56 / 70)
    assert meter.ffn_fraction == pytest.approx(5 / 20)


def test_side_work_is_charged_to_its_part_and_dense_would_not_have_done_it():
    meter = filled()
    before = (meter.tokens, meter.token_fractions(0), meter.layer_fractions())
    with meter.charging("draft"):
        meter.open_pass("decode", torch.ones(2, 3, dtype=torch.bool), num_layers=1, ffn_size=10)
        meter.widths(torch.full((2, 3), 7))
        meter.experts(0, torch.tensor([6, 0]), torch.tensor([5, 10]))
        meter.bill(Cost(flops=Parts(attention=10, scores=40), bytes=Parts(embeddings=3, scores=5)))
        meter.add("router", 1, 2, 0, 0)
    assert meter.cost == Cost(flops=Parts(draft=11, scores=40), bytes=Parts(draft=5, scores=5))
    assert meter.dense == Cost()
    assert meter.num_side_tokens == {"auxiliary": 0, "draft": 6}
    assert before == (meter.tokens, meter.token_fractions(0), meter.layer_fractions())
    meter.add("ffn", 1, 1, 1, 1)
    assert meter.cost.flops.ffn == meter.dense.flops.ffn == 1


def test_only_side_parts_take_whole_passes():
    refused = pytest.raises(SettingError, match="part='head': must be one of auxiliary, draft")
    with refused, Meter().charging("head"):
        pass


def test_widths_outside_a_pass_are_not_kept():
    meter = Meter()
    meter.widths(torch.ones(1, 1, dtype=torch.long))
    assert meter.passes == []


def test_seconds_run():
    meter = Meter()
    assert 0 <= meter.seconds < 60
