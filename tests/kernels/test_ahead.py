"""Prompts read ahead in native code against plain PyTorch: families, bottlenecks, pasts, early and late tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rheostat import kernels
from rheostat.errors import SettingError
from rheostat.runtime import packing
from rheostat.runtime.ahead import Pieces, read_ahead
from rheostat.runtime.building import build
from rheostat.runtime.cache import KVCache
from rheostat.runtime.prefill import Prompt
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import DecoderWeights, PredictedLayers
from tests.kernels.cases import distance
from tests.kernels.test_decoder import routed
from tests.tiny import VOCAB, tiny_model

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler")

LENGTHS, PASTS, ROWS = (40, 1, 70), (0, 5, 9), (2, 0, 3)
MASK = torch.tensor([[0] * (70 - n) + [1] * n for n in LENGTHS])
IDS = torch.randint(3, VOCAB, (3, 70), generator=torch.Generator().manual_seed(5)) * MASK


def drawn(
    weights: DecoderWeights, depth: int, reads: tuple[int, ...], rank: int, previous: tuple[int, ...] = (0, 1)
) -> PredictedLayers:
    """Maps with random weights."""
    draw = torch.Generator().manual_seed(3)
    inputs, outputs = (len(reads) + len(previous)) * weights.hidden_size, 2 * weights.num_kv_heads * weights.head_dim
    sizes = [outputs] * (len(weights.layers) - depth)
    return PredictedLayers(
        depth=depth,
        reads=reads,
        previous=previous,
        squeeze=torch.randn(rank, inputs, generator=draw) / inputs**0.5 if rank else None,
        maps=tuple(torch.randn(n, rank or inputs, generator=draw) / (rank or inputs) ** 0.5 for n in sizes),
        biases=tuple(torch.randn(n, generator=draw) for n in sizes),
        firsts=tuple(torch.randn(n, generator=draw) for n in sizes),
    )


@torch.inference_mode()
def read(weights, maps, num_late=2, settings=None, dtype=torch.float32):
    """The residual stream of the late tokens, the cache and the experts."""
    shape = {"num_layers": len(weights.layers), "num_kv_heads": weights.num_kv_heads, "head_dim": weights.head_dim}
    cache, rope = KVCache(num_rows=4, num_slots=80, dtype=dtype, **shape), RopeTable(weights.inv_freq)
    prompt = Prompt.of(IDS, MASK, rows=list(ROWS), pasts=list(PASTS))
    for row, past in zip(ROWS, PASTS, strict=True):  # what earlier turns have left there
        for one in (cache.keys, cache.values):
            one[:, row, :, :past] = torch.randn(
                one[:, row, :, :past].shape, generator=torch.Generator().manual_seed(row)
            )
    h, experts = read_ahead(weights, maps, prompt, Pieces.of(prompt, num_late), cache, settings, rope)
    return h, cache, experts


def both(weights: DecoderWeights, maps: PredictedLayers, **given):
    native = packing.native_prefill_form(weights, kernels.library())
    return read(native, packing.native_ahead_form(maps, native.reader), **given), read(weights, maps, **given)


def compare(ours, theirs, tolerance=0.01):
    assert distance(ours[0], theirs[0]) < tolerance
    for name in ("keys", "values"):
        mine, other = getattr(ours[1], name).float(), getattr(theirs[1], name).float()
        assert torch.equal(mine != 0, other != 0), "the same slots are written, and no others"
        for layer, wanted in zip(mine, other, strict=True):
            assert distance(layer, wanted) < tolerance


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3", "phi3"])
@pytest.mark.parametrize(
    ("depth", "reads", "rank", "previous"), [(2, (0, 1, 2), 24, (0, 2)), (1, (1,), 0, ()), (3, (0, 2), 7, (1,))]
)
def test_maps_of_each_family(family, depth, reads, rank, previous):
    weights = build(tiny_model(family, layers=4))
    compare(*both(weights, drawn(weights, depth, reads, rank, previous)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_late", [1, 50])
def test_a_cache_of_each_kind_and_few_early_tokens(dtype, num_late):
    weights = build(tiny_model(layers=4))
    compare(*both(weights, drawn(weights, 2, (0, 2), 16), dtype=dtype, num_late=num_late))


def test_routers_below_the_depth():
    weights = build(routed("damage"))
    ours, theirs = both(weights, drawn(weights, 1, (0, 1), 16), settings=torch.tensor([0.0, 0.3, 0.05]))
    assert len(ours[2]) == len(theirs[2]) == 1
    assert float((ours[2][0] == theirs[2][0]).float().mean()) > 0.97, (
        "inputs are rounded: a near tie may fall the other way"
    )


def test_any_number_of_threads(monkeypatch):
    weights = build(tiny_model(layers=4))
    native = packing.native_prefill_form(weights, kernels.library())
    maps = packing.native_ahead_form(drawn(weights, 2, (0, 1, 2), 24), native.reader)
    found = []
    for number in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        found.append(read(native, maps))
    for other in found[1:]:
        assert torch.equal(found[0][1].keys, other[1].keys)
        assert torch.equal(found[0][1].values, other[1].values)


def test_maps_of_another_decoder_are_refused():
    weights = build(tiny_model(layers=4))
    native = packing.native_prefill_form(weights, kernels.library())
    maps = drawn(weights, 2, (0, 2), 16)
    wrong = [
        replace(maps, reads=(0, 3)),
        replace(maps, depth=4),
        replace(maps, reads=(0, 1, 2)),
        replace(maps, squeeze=maps.squeeze[:8]),
        replace(maps, maps=maps.maps[:1]),
        replace(maps, biases=maps.biases[:1]),
    ]
    for one in wrong:
        with pytest.raises(SettingError, match="reads|maps"):
            packing.native_ahead_form(one, native.reader)
