"""Adapted tiny models for the tests of KV Prediction, and maps that are exact by construction."""

from __future__ import annotations

import torch

from rheostat import families
from rheostat.adapted import Adapted
from rheostat.calibration import calibrate
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.methods.kv_prediction.predictor import predictors
from tests.tiny import tiny_fitted, tiny_model, tiny_windows


def given(family: str = "llama", layers: int = 4, **settings: object) -> Adapted:
    """Solved in closed form, its dial measured."""
    defaults: dict[str, object] = {"depths": (1, 2, 3)}
    return tiny_fitted(KVPrediction(**(defaults | settings)), family, layers=layers)  # type: ignore[arg-type]


@torch.no_grad()
def exact(family: str, first: int) -> Adapted:
    """Two layers, of which the second is predicted by its own projections: all is as the dense model's.

    Args:
        first: the token that every text begins with, whose keys and values are a constant.
    """
    adapted = Adapted(tiny_model(family), KVPrediction(depths=(1,), inputs=(), previous=(), rank=0))
    model = adapted.model
    one = predictors(model)[1]
    layer = families.key_values(model)[1]
    seen: dict[str, torch.Tensor] = {}
    handles = layer.watch(lambda kind, tensor: seen.__setitem__(kind, tensor))
    model(torch.tensor([[first]]))
    for handle in handles:
        handle.remove()
    attention = layer.attention
    if families.family_of(model).is_fused:
        weight = attention.qkv_proj.weight[-2 * layer.size :]
        bias = None
    else:
        weight = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
        bias = None if attention.k_proj.bias is None else torch.cat([attention.k_proj.bias, attention.v_proj.bias])
    one.maps[0].weight.copy_(weight)
    one.maps[0].bias.zero_() if bias is None else one.maps[0].bias.copy_(bias)
    one.firsts[0].copy_(torch.cat([seen["keys"], seen["values"]], -1)[0, 0])
    adapted.dial = calibrate(adapted, tiny_windows(seed=1))
    return adapted
