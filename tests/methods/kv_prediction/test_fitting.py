"""The closed form: what it must recover, and how its bottleneck loses as little as can be."""

from __future__ import annotations

import pytest
import torch

from rheostat import families
from rheostat.methods.kv_prediction import fitting
from rheostat.methods.kv_prediction.fitting import _reduce
from rheostat.methods.kv_prediction.predictor import predictors
from rheostat.methods.kv_prediction.prefix import keeping
from rheostat.methods.kv_prediction.watching import recording
from tests.methods.kv_prediction.given import given
from tests.tiny import tiny_windows


def test_the_layer_at_the_depth_itself_is_recovered():
    # Its keys and values are a linear map of what is read.
    adapted = given(inputs=(), previous=(), rank=0, ridge=0.0)
    one = predictors(adapted.model)[2]
    layer = families.key_values(adapted.model)[2].attention
    wanted = torch.cat([layer.k_proj.weight, layer.v_proj.weight])
    torch.testing.assert_close(one.maps[0].weight, wanted, rtol=1e-2, atol=1e-2)


def test_first_tokens_are_a_mean_and_do_not_disturb_the_maps():
    adapted = given()
    windows = tiny_windows()
    with torch.no_grad(), recording(adapted.model, 2) as seen:
        adapted.model(windows)
    one = predictors(adapted.model)[2]
    wanted = torch.cat([seen["keys", 3][:, 0], seen["values", 3][:, 0]], -1).mean(0)
    torch.testing.assert_close(one.firsts[1], wanted, rtol=1e-4, atol=1e-4)


def test_more_inputs_and_less_ridge_explain_more():
    def unexplained(**settings: object) -> float:
        adapted = given(depths=(1,), rank=0, **settings)
        facts = fitting.fit(adapted.model, tiny_windows(), ridge=adapted.method.ridge, progress=lambda *a: None)
        return facts["unexplained"]["1"]

    assert unexplained(inputs=(0.0,)) < unexplained(inputs=())
    assert unexplained(inputs=(0.0,)) < unexplained(inputs=(0.0,), previous=())
    assert unexplained(inputs=(), ridge=1e-3) < unexplained(inputs=(), ridge=10.0)


def test_the_unexplained_share_is_what_the_maps_miss():
    adapted = given(depths=(2,))
    windows = tiny_windows()
    facts = fitting.fit(adapted.model, windows, ridge=1e-3, progress=lambda *a: None)
    one = predictors(adapted.model)[2]
    with torch.no_grad(), recording(adapted.model, 2) as seen, keeping() as kept:
        adapted.model(windows)
        is_first = torch.zeros_like(windows, dtype=torch.bool)
        is_first[:, 0] = True
        misses = []
        for index, layer in enumerate((2, 3)):
            for kind, made in zip(("keys", "values"), one(one.mix(kept, is_first), is_first, index), strict=True):
                wanted = seen[kind, layer][:, 1:].flatten(0, 1)
                misses.append((made[:, 1:].flatten(0, 1) - wanted).square().mean(0) / wanted.var(0, unbiased=False))
    assert facts["unexplained"]["2"] == pytest.approx(torch.cat(misses).mean().item(), abs=1e-3)


def test_a_bottleneck_as_wide_as_the_map_loses_nothing_and_a_narrow_one_the_least():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    gram, scale = x.T @ x, torch.ones(9, dtype=torch.float64)
    squeeze, rest = _reduce(weight, gram, scale, 6)
    torch.testing.assert_close(squeeze @ rest, weight)
    squeeze, rest = _reduce(weight, gram, scale, 2)
    values = torch.linalg.svdvals(x @ weight)
    missed = (x @ (weight - squeeze @ rest)).square().sum()
    torch.testing.assert_close(missed, values[2:].square().sum())
