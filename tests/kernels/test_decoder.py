"""The native step against the plain one, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rheostat import kernels
from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.kernels import FORMATS, NativeDecoder
from rheostat.methods import DynaMoE
from rheostat.runtime import packing, plain
from rheostat.runtime.building import build
from rheostat.runtime.cache import KVCache
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import DecoderWeights
from tests.kernels.cases import TOLERANCE, distance
from tests.tiny import VOCAB, tiny_model, tiny_windows

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")


def packed(model: torch.nn.Module, format: str) -> DecoderWeights:
    return packing.decode_form(build(model), format)


def routed(target: str) -> torch.nn.Module:
    """A tiny model whose routers choose among four experts; the hooks of the dial are taken off."""
    host = tiny_model()
    method = DynaMoE(num_experts=4, tile=4, router_width=8, router_steps=20, target=target)
    adapted = Adapted(host, method)
    adapted.method.fit(host, tiny_windows(), generator=torch.Generator().manual_seed(0))
    adapted._hooks.remove()
    return host


def new_cache(weights: DecoderWeights, num_rows: int, dtype: torch.dtype = torch.float32) -> KVCache:
    """A cache with five random tokens, of which the later rows have fewer."""
    cache = KVCache(
        num_layers=len(weights.layers),
        num_rows=num_rows,
        num_kv_heads=weights.num_kv_heads,
        head_dim=weights.head_dim,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(1)
    for values in (cache.keys, cache.values):
        values[:, :, :, :5] = torch.randn(values[:, :, :, :5].shape, generator=generator)
    cache.lengths.fill_(5)
    cache.starts.copy_(torch.arange(num_rows) % 5)
    return cache


def compare(
    weights: DecoderWeights, settings: torch.Tensor | None, num_rows: int, tolerance: float, steps: int = 5
) -> int:
    """Steps of both, from equal caches. Returns how many different experts were seen."""
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq, weights.rope_scale)
    ours, theirs = new_cache(weights, num_rows), new_cache(weights, num_rows)
    generator, seen = torch.Generator().manual_seed(2), set()
    for _ in range(steps):
        token_ids = torch.randint(3, VOCAB, (num_rows,), generator=generator)
        positions = (ours.lengths - ours.starts).long()
        logits, experts = native(token_ids, positions, ours, settings, rope)
        wanted, chosen = plain.step(weights, token_ids, positions, theirs, settings, rope)
        assert distance(logits, wanted) < tolerance
        assert (experts is None) == (chosen is None)
        if experts is not None:
            assert torch.equal(experts, chosen)
            seen |= set(experts.flatten().tolist())
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.allclose(ours.keys, theirs.keys, atol=100 * tolerance)
    assert torch.allclose(ours.values, theirs.values, atol=100 * tolerance)
    return len(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_each_family(family):
    compare(packed(tiny_model(family), "fp32"), None, num_rows=3, tolerance=2e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_a_step_in_each_format(format):
    compare(packed(tiny_model(), format), None, num_rows=2, tolerance=TOLERANCE[format])


def test_a_step_whose_matrices_are_in_4_and_in_8_bits():
    """Gate and up of the first layer, and the head, lie on the grid of 4 bits."""
    own = build(tiny_model("qwen3"))
    grid, head = (kernels.pack(one, "int4").unpack() for one in (own.layers[0].ffn.gate, own.head))
    first = replace(own.layers[0], ffn=replace(own.layers[0].ffn, gate=grid, up=grid * 0.5))
    weights = packing.decode_form(replace(own, layers=(first, *own.layers[1:]), head=head), "mixed")
    formats = {one.format for one in packing.matrices(weights) if isinstance(one, kernels.PackedMatrix)}
    assert formats == {"int4", "int8"}
    compare(weights, None, num_rows=3, tolerance=TOLERANCE["int4"])


@pytest.mark.parametrize("target", ["damage", "class"])
def test_routed_steps_with_a_dial_for_each_row(target):
    weights = packed(routed(target), "fp32")
    settings = torch.tensor([0.0, 0.02, 0.3, 0.6, 0.9, 1.0])
    assert compare(weights, settings, num_rows=6, tolerance=2e-6) > 2
    assert compare(weights, settings * 0, num_rows=6, tolerance=2e-6) == 0  # no router is asked


def test_a_cache_that_is_outgrown_grows():
    weights = packed(tiny_model(), "fp32")
    cache_slots = new_cache(weights, 1).num_slots
    compare(weights, None, num_rows=1, tolerance=2e-6, steps=cache_slots)


def test_a_cache_may_keep_rows_free_in_each_layer():
    """As a batch does that rows join and leave."""
    weights = packed(tiny_model(), "fp32")
    dense, roomy = new_cache(weights, 2), new_cache(weights, 2)
    for name in ("keys", "values"):
        room = torch.full_like(getattr(roomy, name).repeat(1, 3, 1, 1, 1), torch.nan)
        room[:, :2] = getattr(roomy, name)
        setattr(roomy, name, room[:, :2])
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq)
    ids, positions = torch.tensor([5, 6]), torch.tensor([5, 4])
    logits = [native(ids, positions, cache, None, rope)[0] for cache in (dense, roomy)]
    assert torch.equal(*logits)
    assert torch.equal(dense.keys, roomy.keys)
    roomy.keys = roomy.keys.transpose(2, 4).contiguous().transpose(2, 4)
    with pytest.raises(SettingError, match="cache=.*dense in each layer"):
        native(ids, positions, roomy, None, rope)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(num_threads):
    """However work is shared out, which moves from step to step."""
    weights = packed(routed("damage"), "int8")
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq)
    settings, before = torch.tensor([0.0, 0.3, 0.05]), torch.get_num_threads()
    found = []
    try:
        for number in (1, num_threads):
            torch.set_num_threads(number)
            cache, positions = new_cache(weights, 3), torch.tensor([5, 4, 3])
            steps = [native(torch.tensor([7, 8, 9]), positions + i, cache, settings, rope) for i in range(12)]
            found.append(torch.stack([logits for logits, _ in steps]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_cache_whose_memory_is_another_is_looked_at_again():
    """What is kept from step to step is of one memory and one decoder."""
    pair = [packed(tiny_model(seed=seed), "fp32") for seed in (0, 1)]
    natives = [NativeDecoder(kernels.library(), weights) for weights in pair]
    rope, ids, positions = RopeTable(pair[0].inv_freq), torch.tensor([5, 6]), torch.tensor([5, 4])
    mine, fresh = new_cache(pair[0], 2), [new_cache(pair[0], 2) for _ in range(4)]
    for step, who in enumerate((0, 1, 0, 0)):
        if step == 3:  # as a batch does that rows join and leave
            mine.keys, mine.values = mine.keys.clone(), mine.values.clone()
        mine.truncate(torch.tensor([5, 5], dtype=torch.int32))
        logits, _ = natives[who](ids, positions, mine, None, rope)
        wanted, _ = plain.step(pair[who], ids, positions, fresh[step], None, rope)
        assert distance(logits, wanted) < 2e-6
        assert torch.equal(mine.keys[0, :, :, 5], natives_keys(natives[who], pair[who], ids, positions, rope))


def natives_keys(native: NativeDecoder, weights: DecoderWeights, *arguments: Any) -> torch.Tensor:
    """What the decoder writes into a fresh cache."""
    ids, positions, rope = arguments
    cache = new_cache(weights, 2)
    native(ids, positions, cache, None, rope)
    return cache.keys[0, :, :, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_the_embedding(dtype):
    """Looked up by native code, or by torch what that does not know."""
    weights = packed(tiny_model(), "fp32")
    table = weights.embedding.to(dtype)
    native = NativeDecoder(kernels.library(), replace(weights, embedding=table))
    ids = torch.tensor([0, VOCAB - 1, 7, 7])
    assert torch.equal(native._embed(ids, torch.empty(4, table.shape[1])), table[ids].float())


def test_two_models_at_once():
    pairs = [(NativeDecoder(kernels.library(), w), w) for w in (packed(tiny_model(seed=s), "fp32") for s in (0, 1))]
    caches = [new_cache(weights, 2) for _, weights in pairs]
    ids, positions = torch.tensor([5, 6]), torch.tensor([5, 4])
    rope = RopeTable(pairs[0][1].inv_freq)
    logits = [native(ids, positions, cache, None, rope)[0] for (native, _), cache in zip(pairs, caches, strict=True)]
    for (_, weights), found in zip(pairs, logits, strict=True):
        wanted, _ = plain.step(weights, ids, positions, new_cache(weights, 2), None, rope)
        assert distance(found, wanted) < 2e-6


def test_what_does_not_fit_is_refused():
    weights = packed(tiny_model(), "fp32")
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq)
    ids, positions = torch.tensor([5, 6]), torch.tensor([5, 4])
    for name, arguments in {
        "cache=": (ids, positions, new_cache(weights, 3), None),
        "positions=": (ids, positions[:1], new_cache(weights, 2), None),
        "token_ids=": (torch.tensor([5, VOCAB]), positions, new_cache(weights, 2), None),
        "settings=": (ids, positions, new_cache(weights, 2), torch.ones(3)),
        "token_ids=.5, 6": (torch.tensor([[5, 0], [6, 0]])[:, 0], positions, new_cache(weights, 2), None),
        "positions=.-1": (ids, torch.tensor([-1, 4]), new_cache(weights, 2), None),
        "cache dtype=": (ids, positions, new_cache(weights, 2, torch.float64), None),
    }.items():
        with pytest.raises(SettingError, match=name):
            native(*arguments, rope)
    with pytest.raises(SettingError, match="head="):
        NativeDecoder(kernels.library(), build(tiny_model()))
