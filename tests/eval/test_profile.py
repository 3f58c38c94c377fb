from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.eval.profile import NUM_BINS, Profile, passage
from rheostat.spending import spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows


@pytest.fixture(scope="module")
def adapted() -> Adapted:
    return tiny_adapted()


def profiled(adapted: Adapted, windows: torch.Tensor, compute: float) -> Profile:
    meter = Profile(keep_passes=False)
    for batch in windows.split(3):
        with torch.no_grad(), spend(compute, meter=meter):
            adapted(input_ids=batch, use_cache=False)
    return meter


def test_shares_and_widths_agree_with_the_meter(adapted: Adapted):
    meter = profiled(adapted, tiny_windows(5, 40), (1 + adapted.dial.low) / 2)
    use = meter.use()
    assert use is not None
    assert use["widths"] == [0.25, 0.5, 0.75, 1.0]
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in use["shares"])
    by_layer = [sum(s * w for s, w in zip(shares, use["widths"], strict=True)) for shares in use["shares"]]
    assert by_layer == pytest.approx(meter.layer_fractions(), abs=1e-3)
    assert meter.ffn_fraction < 1


def test_widths_by_position_are_what_each_place_took(adapted: Adapted):
    windows = tiny_windows(5, 20)  # fewer tokens than bins: each has its own
    compute = adapted.dial.low
    meter = profiled(adapted, windows, compute)
    use = meter.use()
    assert use is not None
    places = use["positions"]
    assert places["starts"] == list(range(20))
    assert [row[0] for row in places["width"]] == [1.0, 1.0]  # the first token is pinned to the full FFN
    with torch.no_grad(), spend(compute) as whole:
        adapted(input_ids=windows, use_cache=False)
    wanted = whole.passes[0].ffn_channels.double().mean(0) / (meter.num_layers * meter.ffn_size)  # [T]
    mean = torch.tensor(places["width"], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-3)


def test_long_windows_are_binned(adapted: Adapted):
    use = profiled(adapted, tiny_windows(2, 70), 1.0).use()
    assert use is not None
    assert use["positions"]["starts"] == list(range(0, 70, 3))
    assert len(use["positions"]["starts"]) <= NUM_BINS
    assert all(width == 1.0 for row in use["positions"]["width"] for width in row)


def test_a_model_that_routes_nothing_has_no_use():
    assert profiled(Adapted(tiny_model()), tiny_windows(2, 16), 1.0).use() is None


def test_layers_with_other_experts_have_no_use():
    meter = Profile(ffn_size=8)
    for layer, sizes in enumerate(([4, 8], [2, 8])):
        meter.experts(layer, torch.tensor([1, 1]), torch.tensor(sizes))
    assert meter.use() is None


def test_a_passage_costs_what_the_tokens_cost(adapted: Adapted, tiny_tokenizer):
    window = tiny_windows(1, 30)[0]
    dials = [0.9, adapted.dial.low]
    found = passage(adapted, tiny_tokenizer, window, dials, 12)
    assert found["tokens"] == [tiny_tokenizer.decode([token]) for token in window[:12].tolist()]
    assert [row["asked"] for row in found["rows"]] == dials
    with torch.no_grad(), spend(dials[1]) as meter:
        adapted(input_ids=window[None, :12], use_cache=False)
    assert found["rows"][1]["widths"] == pytest.approx(meter.token_fractions(), abs=1e-4)
    assert found["rows"][1]["compute"] == meter.compute
    assert found["rows"][0]["widths"] != found["rows"][1]["widths"]
