from __future__ import annotations

import pytest
import torch

from rheostat.methods.dynamoe.baselines import baselines, static_widths
from tests.test_contract import fitted

SIZES = torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_static_widths_buy_where_damage_falls_most():
    damage = torch.tensor([[9.0, 1.0, 0.5], [0.2, 0.1, 0.05]])
    assert static_widths(damage, SIZES, 1.5).tolist() == [1, 0]
    assert static_widths(damage, SIZES, 4.0).tolist() == [3, 3]


def test_static_widths_are_never_below_the_width_asked():
    generator = torch.Generator().manual_seed(0)
    for share in (1.0, 1.7, 2.5, 3.3):
        damage = torch.rand(6, 3, generator=generator).sort(descending=True).values
        assert SIZES[static_widths(damage, SIZES, share)].mean() >= share - 1e-6


def test_random_baseline_uses_experts_as_often_as_the_router():
    adapted = fitted("dynamoe", "llama")
    counts = {0: torch.tensor([10, 0, 30, 60]), 1: torch.tensor([0, 100, 0, 0])}
    random = baselines(adapted.model, counts, seed=0)["random"]
    drawn = torch.bincount(random(0, torch.zeros(20000, 1)), minlength=4) / 20000
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.0, 0.3, 0.6]), rtol=0, atol=0.02)
    assert random(1, torch.zeros(50, 1)).unique().tolist() == [1]


def test_static_baseline_has_one_width_a_layer():
    adapted = fitted("dynamoe", "llama")
    counts = {0: torch.tensor([0, 0, 50, 50]), 1: torch.tensor([0, 0, 50, 50])}
    static = baselines(adapted.model, counts, seed=0)["static"]
    chosen = [static(layer, torch.zeros(7, 1)) for layer in (0, 1)]
    assert all(len(one.unique()) == 1 for one in chosen)
    assert adapted.model.base_model.layers[0].mlp.widths[torch.stack(chosen)].float().mean() >= 56


@pytest.mark.gpu
def test_baselines_of_a_model_on_a_gpu_are_those_on_the_processor():
    adapted = fitted("dynamoe", "llama")
    counts = {layer: torch.tensor([10, 0, 30, 60]) for layer in (0, 1)}
    x = torch.zeros(40, 1)
    wanted = [one(1, x) for one in baselines(adapted.model, counts, seed=0).values()]
    adapted.model.cuda()
    found = baselines(adapted.model, {layer: one.cuda() for layer, one in counts.items()}, seed=0)
    given = [one(1, x.cuda()) for one in found.values()]
    assert all(one.is_cuda and torch.equal(one.cpu(), other) for one, other in zip(given, wanted, strict=True))
