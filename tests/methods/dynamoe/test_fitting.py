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


def test_routers_alone_are_fitted_to_weights_that_have_moved():
    adapted = fit(METHOD)
    windows = tiny_windows(24)
    for layer in adapted.model.base_model.layers:
        with torch.no_grad():  # damages of the small slices rise a thousandfold
            layer.mlp.downs[0].weight.normal_(generator=torch.Generator().manual_seed(1))
            layer.mlp.downs[1].weight.normal_(generator=torch.Generator().manual_seed(2))
    before = {key: value.clone() for key, value in adapted.method.state(adapted.model).items()}
    facts = adapted.method.settle(adapted.model, windows, generator=torch.Generator().manual_seed(3))
    after = adapted.method.state(adapted.model)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed
    assert all(".router." in key or key.endswith("mean_damage") for key in changed)
    for layer, figures in zip(adapted.model.base_model.layers, facts["layers"], strict=True):
        scores = layer.mlp.router(
            torch.randn(64, layer.mlp.mlp.hidden_size, generator=torch.Generator().manual_seed(4))
        )
        # The first two slices are ruined and the third is not, and the scores know it.
        assert (scores[:, 1] - scores[:, 2]).mean() > 2
        assert figures["mean_damage"][1] > 10 * figures["mean_damage"][2]


def test_routers_that_training_taught_alone_are_left():
    adapted = fit(dataclasses.replace(METHOD, trained="routers"))
    assert adapted.method.settle(adapted.model, tiny_windows(4), generator=torch.Generator()) == {}


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
