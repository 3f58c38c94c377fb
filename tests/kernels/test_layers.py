"""A decoder layer for the native code: everything lands at its place, and what it cannot do is refused."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.kernels import pack
from rheostat.kernels.layers import describe_layer, describe_router, packed
from rheostat.kernels.structs import Keep
from rheostat.runtime.building import build
from rheostat.runtime.packing import decode_form
from rheostat.runtime.weights import LayerWeights, RouterWeights
from tests.tiny import tiny_model


def layer_of(family: str) -> LayerWeights:
    """The second layer of a tiny model, packed, with weights that tell where each field came from."""
    return decode_form(build(tiny_model(family)), "fp32").layers[1]


def floats(address: int | None, number: int) -> list[float] | None:
    """What is stored there."""
    return None if not address else list((ctypes.c_float * number).from_address(address))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_vector_is_where_the_native_code_looks_for_it(family):
    layer, keep = layer_of(family), Keep()
    names = ("input_norm", "post_norm", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
    for number, name in enumerate(names):  # no two alike, so that a mix-up shows
        if (vector := getattr(layer, name)) is not None:
            layer = replace(layer, **{name: torch.full_like(vector, number + 1.5)})
    made = describe_layer(keep, layer, "silu")
    for name in names:
        vector = getattr(layer, name)
        wanted = None if vector is None else vector.tolist()
        assert floats(getattr(made, name), 0 if vector is None else len(vector)) == wanted, name
    assert [getattr(made, name).data for name in "qkvo"] == [getattr(layer, name).descriptor().data for name in "qkvo"]
    assert (made.ffn.gate.data, made.ffn.up.data) == (
        layer.ffn.gate.descriptor().data,
        layer.ffn.up.descriptor().data,
    )
    assert made.router.width == 0, "there is none"


def test_a_window_and_a_layer_without_positions_are_told():
    made = describe_layer(Keep(), replace(layer_of("llama"), window=7, has_rope=False), "silu")
    assert (made.window, made.has_rope) == (7, 0)


@pytest.mark.parametrize(("rule", "outputs"), [("damage", 3), ("confidence", 4)])
def test_a_router_and_its_rule(rule, outputs):
    router = RouterWeights(
        key="x",
        rule=rule,
        inner=torch.randn(8, 32),
        inner_bias=torch.arange(8.0),
        outer=torch.randn(outputs, 8),
        outer_bias=torch.arange(float(outputs)),
    )
    keep = Keep()
    made = describe_router(keep, router)
    assert (made.width, made.num_outputs, made.is_confidence) == (8, outputs, rule == "confidence")
    assert (made.inner.rows, made.inner.cols) == (8, 32)
    assert floats(made.inner_bias, 8) == list(range(8))
    assert floats(made.outer, 8 * outputs) == router.outer.flatten().tolist()
    assert floats(made.outer_bias, outputs) == list(range(outputs))
    with pytest.raises(SettingError, match="rule='chance'"):
        describe_router(keep, replace(router, rule="chance"))


def test_what_the_native_code_cannot_do_is_refused():
    layer = layer_of("llama")
    with pytest.raises(SettingError, match="q, k, v="):
        describe_layer(Keep(), replace(layer, k=pack(layer.k.unpack(), "bf16")), "silu")
    with pytest.raises(SettingError, match="o='Tensor'"):
        describe_layer(Keep(), replace(layer, o=layer.o.unpack()), "silu")
    with pytest.raises(SettingError, match="down='Tensor'"):
        packed("down", torch.zeros(2, 2))
    describe_layer(Keep(), replace(layer, o=pack(layer.o.unpack(), "bf16")), "silu")  # o is multiplied by itself
