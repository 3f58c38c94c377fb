from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.methods.dynamoe import DynaMoE
from tests.tiny import SMOLLM2, tiny_model


def test_floor_of_smollm2_is_what_the_documentation_says():
    assert DynaMoE().floor(SMOLLM2) == pytest.approx(0.560, abs=5e-4)
    assert DynaMoE(num_experts=8).floor(SMOLLM2) < 0.49


def test_predicted_cost_spends_what_was_asked():
    dense = DynaMoE().cost(SMOLLM2, num_tokens=1)
    for compute in (0.9, 0.7, 0.6):
        cost = DynaMoE().cost(SMOLLM2, compute=compute, num_tokens=1)
        assert cost.flops.flat / dense.flops.flat == pytest.approx(compute, abs=1e-3)


def test_parameters_grow_by_the_routers_only_without_refit():
    before = sum(p.numel() for p in tiny_model().parameters())
    adapted = Adapted(tiny_model(), DynaMoE(tile=4, router_width=8))
    routers = 2 * (32 * 8 + 8 + 8 * 3 + 3)
    assert sum(p.numel() for p in adapted.model.parameters()) == before + routers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 1}, "num_experts=1: must be an integer of at least 2"),
        ({"num_experts": 2.5}, "num_experts"),
        ({"ranking": "best"}, "ranking='best': must be one of"),
        ({"criterion": "luck"}, "criterion"),
        ({"target": "both"}, "target"),
        ({"trained": "some"}, "trained"),
        ({"distill_weight": 1.5}, "distill_weight"),
        ({"ridge": float("nan")}, "ridge"),
        ({"gradient_share": 0.0}, "gradient_share"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(SettingError, match=message):
        DynaMoE(**settings)


def test_attaching_twice_is_refused():
    adapted = Adapted(tiny_model(), DynaMoE(tile=4))
    with pytest.raises(SettingError, match="attached already"):
        Adapted(adapted.model, DynaMoE(tile=4))


def test_a_tile_as_wide_as_the_ffn_is_refused():
    with pytest.raises(SettingError, match=r"dynamoe.tile=64: must be below the FFN's width, 64"):
        Adapted(tiny_model(), DynaMoE(tile=64))


@pytest.mark.parametrize("spoil", ["missing", "shape", "unknown"])
def test_tensors_that_do_not_fit_are_refused(spoil):
    adapted = Adapted(tiny_model(), DynaMoE(tile=4))
    tensors = dict(adapted.method.state(adapted.model))
    if spoil == "missing":
        del tensors["0.order"]
    elif spoil == "shape":
        tensors["0.order"] = torch.zeros(3)
    else:
        tensors["9.order"] = tensors["0.order"]
    with pytest.raises(SettingError, match="order"):
        adapted.method.load_state(adapted.model, tensors)
