"""Forms of the weights: which format, what is shared, and what cannot be held."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.kernels import FORMATS
from rheostat.runtime import packing
from rheostat.runtime.building import Unsupported, build
from rheostat.runtime.weights import DecoderWeights, DraftForm, PredictedLayers
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def weights() -> DecoderWeights:
    return build(tiny_model("qwen3"))


def test_the_format_follows_the_dtype_unless_it_is_given():
    assert packing.check_format("auto", torch.bfloat16) == "bf16"
    assert packing.check_format("int4", torch.bfloat16) == "int4"
    with pytest.raises(SettingError, match="weights='int3'"):
        packing.check_format("int3", torch.float32)
    with pytest.raises(Unsupported, match="float64"):
        packing.check_format("auto", torch.float64)


@pytest.mark.parametrize("format", FORMATS)
def test_the_plain_twin_holds_the_numbers_of_the_packed_form(weights, format):
    packed, plain = (packing.decode_form(weights, format, is_packed=one) for one in (True, False))
    for a, b, whole in zip(*(packing.matrices(one) for one in (packed, plain, weights)), strict=True):
        if a is not packed.embedding:  # whose rows are looked up as they are
            assert torch.equal(a.unpack(), b)
            assert float((b - whole).norm() / whole.norm()) < {"int4": 0.15, "int8": 0.01}.get(format, 0.005)


def test_mixed_keeps_to_the_last_bit_what_fits_4_bits_and_the_rest_in_8(weights):
    """As for a model from a Q4_1 file, of which one matrix was changed."""
    first = weights.layers[0]
    grid = packing.pack(first.ffn.gate, "int4", packing.GROUP).unpack()
    odd = replace(first, ffn=replace(first.ffn, gate=grid, up=grid), o=packing.pack(first.o, "int4").unpack())
    both = replace(weights, layers=(odd, *weights.layers[1:]))
    made = packing.decode_form(both, "mixed")
    gate, other = made.layers[0].ffn.gate, made.layers[1].ffn.gate
    assert (gate.format, made.layers[0].o.format, other.format, made.head.format) == ("int4", "int4", "int8", "int8")
    assert torch.equal(gate.unpack(), grid)
    half = replace(odd, ffn=replace(odd.ffn, up=first.ffn.up))  # native code takes gate and up alike
    made = packing.decode_form(replace(weights, layers=(half,)), "mixed")
    assert made.layers[0].ffn.gate.format == made.layers[0].ffn.up.format == "int8"


def test_mixed_has_no_group_across_an_edge():
    grid = packing.pack(torch.randn(16, 96), "int4", packing.GROUP).unpack()
    assert packing.mixed_format(grid, edges=(32, 64)) == "int4"
    assert packing.mixed_format(grid, edges=(48,)) == "int8"


def test_fewer_bits_are_fewer_bytes(weights):
    held = {one: packing.own_bytes(packing.decode_form(weights, one), weights) for one in FORMATS}
    assert held["fp32"] > held["bf16"] == held["fp16"] > held["int8"] > held["int4"]


def test_what_a_format_cannot_hold_is_refused(weights):
    with pytest.raises(Unsupported, match="fp16"):
        packing.decode_form(replace(weights, head=weights.head * 1e6), "fp16")
    packing.check_edges((32, 64, 80), "int4")  # the last one may be anything
    packing.check_edges((16, 64), "int8")
    with pytest.raises(Unsupported, match="multiples of 32"):
        packing.check_edges((16, 64), "int4")


@pytest.mark.parametrize("place", ["ffn", "attention", "head"])
def test_a_draft_shares_all_that_it_does_not_name(weights, place):
    decode = packing.decode_form(weights, "int8")
    draft = packing.draft_form(weights, decode, DraftForm(places=(place,)))
    own = {
        "ffn": draft.layers[1].ffn.gate is not decode.layers[1].ffn.gate,
        "attention": draft.layers[1].o is not decode.layers[1].o,
        "head": draft.head is not decode.head,
    }
    assert own == {name: name == place for name in own}
    both = packing.own_bytes(draft, weights, decode)
    assert 0 < both < packing.own_bytes(draft, weights)


def test_a_matrix_in_the_right_dtype_is_not_copied(weights):
    same = packing.prefill_form(weights, torch.float32)
    assert packing.own_bytes(same, weights) == 0
    other = packing.prefill_form(weights, torch.bfloat16)
    assert other.head is weights.head, "it sees one token a row"
    assert other.layers[0].q.dtype == torch.bfloat16


def test_bytes_of_what_several_places_share_are_counted_once(weights):
    shared = replace(weights, layers=(weights.layers[0], weights.layers[0]))
    assert packing.own_bytes(shared) == packing.own_bytes(replace(weights, layers=weights.layers[:1]))
    assert packing.own_bytes(weights, weights) == 0


def test_maps_of_several_layers_become_one_product():
    maps = tuple(torch.randn(8, 16) for _ in range(3))
    vectors = tuple(torch.randn(8) for _ in range(3))
    own = PredictedLayers(depth=1, reads=(0,), squeeze=None, maps=maps, biases=vectors, firsts=vectors)
    made = packing.ahead_form(own, torch.float32)
    x = torch.randn(16)
    assert torch.equal(made.maps[0] @ x, torch.cat([one @ x for one in maps]))
    assert len(made.maps) == len(made.biases) == len(made.firsts) == 1
    assert packing.ahead_bytes(own, own) == 0
    assert packing.ahead_bytes(made, own) == 4 * own.num_weights
