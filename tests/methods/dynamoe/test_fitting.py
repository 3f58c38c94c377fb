from __future__ import annotations

import dataclasses

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.eval.quality import Run, evaluate
from rheostat.methods.dynamoe import DynaMoE
from tests.tiny import tiny_model, tiny_windows

METHOD = DynaMoE(tile=4, router_width=8, router_steps=40)


def fit(method: DynaMoE, family: str = "llama", seed: int = 0) -> Adapted:
    adapted = Adapted(tiny_model(family), method)
    adapted.method.fit(adapted.model, tiny_windows(24), generator=torch.Generator().manual_seed(seed))
    return adapted


def test_a_seed_fixes_every_tensor():
    first, second = (fit(METHOD).method.state(fit(METHOD).model) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_refitted_slices_are_closer_to_dense_than_truncated_ones():
    refitted = fit(METHOD)
    truncated = fit(dataclasses.replace(METHOD, refit=False))

    def divergence(adapted: Adapted, expert: int) -> float:
        ids = tiny_windows(24)
        from rheostat.spending import spend

        with torch.no_grad():
            dense = adapted(input_ids=ids).logits.log_softmax(-1)
            with spend(override=lambda _, x: torch.full((len(x),), expert)):
                sliced = adapted(input_ids=ids).logits.log_softmax(-1)
        return float((dense.exp() * (dense - sliced)).sum(-1).mean())

    for expert in range(3):
        assert divergence(refitted, expert) < divergence(truncated, expert)


def test_mean_damage_falls_with_width():
    adapted = fit(METHOD)
    for layer in adapted.model.base_model.layers:
        damage = layer.mlp.mean_damage
        assert damage[0] > damage[1] > damage[2] > 0


@pytest.mark.parametrize("changes", [
    {"sequential": False}, {"refit": False}, {"refit_bias": False},
    {"criterion": "cosine"}, {"criterion": "error"}, {"criterion": "projection"}, {"criterion": "residual"},
    {"target": "class"}, {"ranking": "none"}, {"ranking": "activation"}, {"gradient_share": 1.0}, {"num_experts": 2},
])  # fmt: skip
def test_every_option_gives_finite_working_models(changes):
    adapted = fit(dataclasses.replace(METHOD, **changes))
    assert all(torch.isfinite(t).all() for t in adapted.method.state(adapted.model).values())
    scores = evaluate(adapted, tiny_windows(4), [Run(label="mid", native={"dynamoe": 0.02})])
    assert scores[1].loss == pytest.approx(scores[1].loss)
