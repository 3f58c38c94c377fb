"""Prompts in native code against plain PyTorch: families, windows, dials by row, pasts, ranges of layers."""

from __future__ import annotations

import pytest
import torch

from rheostat import kernels
from rheostat.errors import SettingError
from rheostat.kernels import NativeReader
from rheostat.runtime import packing
from rheostat.runtime.building import build
from rheostat.runtime.cache import KVCache
from rheostat.runtime.prefill import Prompt, embed, run_layers
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import DecoderWeights
from tests.kernels.cases import distance
from tests.kernels.test_decoder import FAMILIES, routed
from tests.tiny import VOCAB, tiny_model

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler")

LENGTHS = (40, 1, 70)
MASK = torch.tensor([[0] * (70 - n) + [1] * n for n in LENGTHS])
IDS = torch.randint(3, VOCAB, (3, 70), generator=torch.Generator().manual_seed(5)) * MASK
BOTH = range(2)


def packed(weights: DecoderWeights) -> DecoderWeights:
    """What the native code takes, and, unpacked, what plain PyTorch compares it with."""
    return packing.native_prefill_form(weights, kernels.library())


def new_cache(weights: DecoderWeights, dtype: torch.dtype = torch.float32) -> KVCache:
    shape = {"num_layers": 2, "num_kv_heads": weights.num_kv_heads, "head_dim": weights.head_dim}
    return KVCache(num_rows=4, num_slots=80, dtype=dtype, **shape)


@torch.inference_mode()
def read(weights, settings=None, dtype=torch.float32):
    """The residual stream, the cache and the experts after all layers; rows of the cache in another order."""
    cache, rope = new_cache(weights, dtype), RopeTable(weights.inv_freq, weights.rope_scale)
    prompt = Prompt.of(IDS, MASK, rows=[2, 0, 3])
    h = embed(weights, prompt)
    experts = run_layers(weights, BOTH, h, prompt, cache, settings, rope)
    return h, cache, experts


def compare(ours, theirs, tolerance=0.01):
    assert distance(ours[0], theirs[0]) < tolerance
    for name in ("keys", "values"):
        mine, other = getattr(ours[1], name).float(), getattr(theirs[1], name).float()
        assert distance(mine, other) < tolerance
        assert not mine[:, 1].any(), "a row that is not the prompt's"
    assert (ours[2] is None) == (theirs[2] is None)
    if ours[2] is not None:
        for mine, other in zip(ours[2], theirs[2], strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_each_family(family):
    model = tiny_model(family)
    if family == "mistral":
        model.config.sliding_window = 8
    weights = build(model)
    compare(read(packed(weights)), read(weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_each_kind(dtype):
    weights = build(tiny_model())
    compare(read(packed(weights), dtype=dtype), read(weights))


@pytest.mark.parametrize("target", ["damage", "class"])
def test_a_dial_for_each_row(target):
    weights = build(routed(target))
    for settings in ([0.0, 0.3, 0.05], [0.9, 0.2, 0.0], [0.5, 0.5, 0.5]):
        wanted = read(weights, torch.tensor(settings))
        ours = read(packed(weights), torch.tensor(settings))
        assert len(ours[2]) == 2
        same = torch.stack(ours[2]) == torch.stack(wanted[2])
        assert float(same.float().mean()) > 0.97, "inputs are rounded: a near tie may fall the other way"
        for place, setting in zip((0, 40, 41), settings, strict=True):
            assert all(one[place] == 3 for one in ours[2]), "a text's first token is dense"
            if setting == 0:
                assert all((one[place : place + 40] == 3).all() for one in ours[2])
        assert distance(ours[0], wanted[0]) < 0.05
    compare(read(packed(weights), torch.zeros(3)), read(weights, torch.zeros(3)))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.inference_mode()
def test_pieces_of_prompts_and_ranges_of_layers(family):
    model = tiny_model(family)
    if family == "mistral":
        model.config.sliding_window = 8
    plain_weights = build(model)
    weights, rope = packed(plain_weights), RopeTable(plain_weights.inv_freq)
    whole, dense, _ = read(weights)
    cache = new_cache(weights)
    prompt = Prompt.of(IDS, MASK, rows=[2, 0, 3])
    h = embed(weights, prompt)
    run_layers(weights, range(1), h, prompt, cache, None, rope)
    assert not cache.keys[1].any()
    pieces, start = [], 0
    for row, length in zip((2, 0, 3), LENGTHS, strict=True):
        for low, high in ((0, length // 3), (length // 3, length)):
            ids = torch.ones(1, high - low, dtype=torch.long)
            one = h[start + low : start + high].clone()
            if high > low:
                run_layers(weights, range(1, 2), one, Prompt.of(ids, None, rows=[row], pasts=[low]), cache, None, rope)
            pieces.append(one)
        start += length
    assert distance(torch.cat(pieces), whole) < 0.005
    assert distance(cache.keys, dense.keys) < 0.005


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_any_number_of_threads(num_threads):
    weights = packed(build(routed("damage")))
    settings = torch.tensor([0.0, 0.3, 0.05])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = read(weights, settings)
        torch.set_num_threads(num_threads)
        for _ in range(3):
            ours = read(weights, settings)
            assert torch.equal(ours[0], wanted[0]), "what a row gives does not depend on who computed it"
            assert torch.equal(ours[1].keys, wanted[1].keys)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused():
    weights = build(tiny_model())
    ours, rope = packed(weights), RopeTable(weights.inv_freq)
    prompt = Prompt.of(IDS, MASK)
    h, cache = embed(weights, prompt), new_cache(weights)
    strange = new_cache(weights, torch.float64)
    for name, arguments in {
        "layers=": (range(3), h, prompt, cache),
        "h=": (BOTH, h[1:], prompt, cache),
        "cache=": (BOTH, h, prompt, strange),
        "rows=": (BOTH, h, Prompt.of(IDS, MASK, rows=[0, 1, 4]), cache),
    }.items():
        with pytest.raises(SettingError, match=name):
            ours.reader(*arguments, None, rope)
    for wrong in (-1, VOCAB):
        with pytest.raises(SettingError, match="token_ids="):
            ours.reader.embed(torch.tensor([5, wrong]))
    with pytest.raises(SettingError, match="weights="):
        NativeReader(kernels.library(), packing.decode_form(weights, "int8"))
