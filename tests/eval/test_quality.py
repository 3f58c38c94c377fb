"""Scores under the dial, checked against a cross-entropy by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.eval.quality import Run, decode_bytes, evaluate
from rheostat.methods import Chain, DynaMoE, KVPrediction
from rheostat.spending import current_spending, spend
from tests.tiny import tiny_adapted, tiny_fitted, tiny_model, tiny_windows

WINDOWS = tiny_windows(7, 24, seed=5)


@pytest.fixture(scope="module")
def adapted() -> Adapted:
    return tiny_adapted("gemma3_text")


def by_hand(adapted: Adapted, compute: float) -> tuple[list[float], list[list[int]]]:
    """Mean loss of each window, token by token, and the most likely tokens."""
    losses, best = [], []
    for window in WINDOWS:
        with spend(compute), torch.no_grad():
            logits = adapted(input_ids=window[None]).logits[0].double()
        chances = [logits[t].softmax(0)[window[t + 1]].item() for t in range(len(window) - 1)]
        losses.append(-sum(math.log(chance) for chance in chances) / len(chances))
        best.append(logits[:-1].argmax(1).tolist())
    return losses, best


def test_figures_are_those_of_a_cross_entropy_by_hand(adapted):
    compute = (1 + adapted.dial.low) / 2
    dense, mine = evaluate(adapted, WINDOWS, [Run(label="half", compute=compute)])
    assert (dense.label, mine.label) == ("dense", "half")
    dense_losses, dense_best = by_hand(adapted, 1.0)
    losses, best = by_hand(adapted, compute)
    mean = sum(losses) / 7
    assert dense.loss == pytest.approx(sum(dense_losses) / 7, rel=1e-5)
    assert mine.loss == pytest.approx(mean, rel=1e-5)
    assert mine.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert mine.ratio == pytest.approx(mine.perplexity / dense.perplexity, rel=1e-6)
    gaps = torch.tensor(losses) - torch.tensor(dense_losses)
    assert mine.loss_error == pytest.approx(float(gaps.std()) / 7**0.5, rel=1e-3)
    assert mine.num_tokens == 7 * 23
    texts = WINDOWS[:, 1:].tolist()
    pairs = [(a, b, c) for rows in zip(best, dense_best, texts, strict=True) for a, b, c in zip(*rows, strict=True)]
    assert mine.agreement == pytest.approx(sum(a == b for a, b, _ in pairs) / len(pairs))
    assert mine.accuracy == pytest.approx(sum(a == c for a, _, c in pairs) / len(pairs))
    assert mine.agreement < 1
    agreed = torch.tensor([[a == b for a, b in zip(*rows, strict=True)] for rows in zip(best, dense_best, strict=True)])
    assert mine.agreement_error == pytest.approx(float(agreed.double().mean(1).std()) / 7**0.5)
    right = [
        torch.tensor([[a == c for a, c in zip(*rows, strict=True)] for rows in zip(one, texts, strict=True)]).double()
        for one in (best, dense_best)
    ]
    assert mine.accuracy_error == pytest.approx(float((right[0] - right[1]).mean(1).std()) / 7**0.5)
    assert dense.accuracy_error == dense.agreement_error == 0.0


def test_full_compute_is_the_dense_model(adapted):
    dense, full = evaluate(adapted, WINDOWS, [Run(label="full", compute=1.0)])
    assert full.ratio == full.agreement == full.compute == full.ffn_fraction == 1.0
    assert full.loss_error == 0.0
    assert full.loss == dense.loss


def test_batches_do_not_change_the_figures(adapted):
    runs = [Run(label="low", compute=adapted.dial.low)]
    told = []
    at_once = evaluate(adapted, WINDOWS, runs)[1]
    one_by_one = evaluate(adapted, WINDOWS, runs, batch_tokens=1, progress=lambda *call: told.append(call))[1]
    assert one_by_one.loss == pytest.approx(at_once.loss, rel=1e-4)
    assert one_by_one.compute == pytest.approx(at_once.compute)
    assert told == [("scoring", i, 7) for i in range(8)]


def test_what_was_spent_is_in_the_figures_and_the_meter(adapted):
    meters = {}
    compute = (1 + adapted.dial.low) / 2
    dense, mine = evaluate(adapted, WINDOWS, [Run(label="half", compute=compute)], meters=meters)
    assert set(meters) == {"dense", "half"}
    assert mine.asked == compute
    assert mine.compute == meters["half"].compute < 1
    assert mine.compute < mine.compute_with_context < 1
    assert meters["half"].tokens == WINDOWS.numel()
    assert mine.seconds > 0
    assert mine.flops_per_token == meters["half"].cost.flops.total / WINDOWS.numel() < dense.flops_per_token
    wanted = adapted.method.cost(adapted.geometry, compute=mine.compute, num_tokens=1, past=24, itemsize=4)
    assert mine.bytes_per_token == wanted.bytes.total < dense.bytes_per_token
    assert dense.bytes_per_token == decode_bytes(adapted, 1.0, 24)
    assert meters["half"].use() is not None
    assert json.loads(json.dumps(mine.to_dict()))["label"] == "half"
    assert current_spending() is None


def test_an_override_chooses_the_experts_and_pays_no_router(adapted):
    def smallest(layer: int, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), dtype=torch.long)

    meters = {}
    runs = [Run(label="static", override=smallest), Run(label="native", native={"dynamoe": 1e9})]
    _, static, native = evaluate(adapted, WINDOWS, runs, meters=meters)
    assert static.loss == pytest.approx(native.loss, rel=1e-5)
    assert static.ffn_fraction == pytest.approx(native.ffn_fraction)
    assert static.ffn_fraction == pytest.approx((0.25 * 23 + 1) / 24)  # the first token is pinned
    least = decode_bytes(adapted, adapted.method.floor(adapted.geometry), 24)
    assert decode_bytes(adapted, 0.01, 24) == least  # without a router a run can end below the floor
    assert meters["static"].cost.flops.router == 0 < meters["native"].cost.flops.router


def test_bytes_of_a_chain_that_cannot_tell_are_not_made_up(monkeypatch: pytest.MonkeyPatch):
    adapted = tiny_adapted(router_steps=0)

    def unknown(*_: object, **__: object) -> None:
        raise SettingError("known by measurement only")

    monkeypatch.setattr(type(adapted.method), "cost", unknown)
    assert decode_bytes(adapted, 0.8, 24) is None


def test_one_window_has_no_spread(adapted):
    assert evaluate(adapted, WINDOWS[:1], [Run(label="low", compute=adapted.dial.low)])[1].loss_error == 0.0


def test_out_of_reach_is_refused():
    with pytest.raises(SettingError, match="compute=0.5: must be 1.0"):
        evaluate(Adapted(tiny_model()), WINDOWS, [Run(label="half", compute=0.5)])


def test_a_method_that_reads_prompts_is_scored_on_what_follows_them():
    adapted = tiny_fitted(KVPrediction(depths=(1, 2)), layers=4)
    dense, cheap = evaluate(adapted, tiny_windows(4), [Run(label="cheap", compute=adapted.dial.low)])
    assert dense.num_tokens == 4 * (32 - 24 - 1)
    assert dense.compute == 1.0
    assert cheap.compute < 0.95  # the answer is dense
    assert cheap.loss != dense.loss


def test_a_chain_of_both_is_profiled_where_the_model_itself_read():
    methods = [KVPrediction(depths=(2,)), DynaMoE(tile=4, router_width=8, router_steps=0)]
    adapted, meters = Adapted(tiny_model(layers=4), Chain(methods)), {}
    runs = [Run(label="read ahead", native={"kv_prediction": 2.0}), Run(label="whole")]
    evaluate(adapted, tiny_windows(4), runs, meters=meters)
    meter = meters["read ahead"]
    assert [rows.tolist() for rows in meter.position_rows.values()] == [[0] * 23 + [4] * 8] * 4
    places = meter.use()["positions"]["width"]
    assert [row[:23] + row[31:] for row in places] == [[0.0] * 23] * 4
    assert all(width == 1.0 for row in places for width in row[23:31])
    assert meters["whole"].use()["positions"]["width"] == [[1.0] * 31] * 4
