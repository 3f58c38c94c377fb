"""Several new tokens a row: against the plain twin, and bit for bit against one token at a time."""

from __future__ import annotations

import pytest
import torch

from rheostat import kernels
from rheostat.caches.counting import saved_bytes
from rheostat.errors import SettingError
from rheostat.kernels import FORMATS, NativeDecoder
from rheostat.runtime import plain
from rheostat.runtime.cache import KVCache
from rheostat.runtime.planes import PlaneCache
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import DecoderWeights
from rheostat.sampling import most_likely
from tests import tiny
from tests.kernels.cases import TOLERANCE, distance
from tests.kernels.test_decoder import FAMILIES, packed, routed
from tests.tiny import VOCAB, tiny_model

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler")

COUNTS = (3, 0, 1, 5)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def filled(weights: DecoderWeights, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> KVCache:
    """A cache of random keys and values; the rows' padding differs."""
    heads, dim = weights.num_kv_heads, weights.head_dim
    cache = KVCache(
        num_layers=len(weights.layers), num_rows=len(lengths), num_kv_heads=heads, head_dim=dim, dtype=dtype
    )
    cache.reserve(max(lengths))
    generator = torch.Generator().manual_seed(1)
    for states in (cache.keys, cache.values):
        states[:, :, :, : max(lengths)] = torch.randn(states[:, :, :, : max(lengths)].shape, generator=generator)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.starts.copy_(torch.arange(len(lengths)) % 2)
    return cache


def copied(cache: KVCache, group_size: int = 0, value_group_size: int = 0) -> KVCache:
    """The same tokens in a cache of its own, in planes where a group size is given."""
    if group_size:
        return PlaneCache.of(cache, group_size, value_group_size)
    layers, rows, heads, slots, dim = cache.keys.shape
    new = KVCache(
        num_layers=layers, num_rows=rows, num_kv_heads=heads, head_dim=dim, num_slots=slots, dtype=cache.dtype
    )
    for name in ("keys", "values", "lengths", "starts"):
        getattr(new, name).copy_(getattr(cache, name))
    return new


def tokens_of(counts: tuple[int, ...], firsts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [N], and the positions [N] that follow each row's `firsts`."""
    ids = torch.randint(3, VOCAB, (sum(counts),), generator=torch.Generator().manual_seed(2))
    return ids, torch.cat([torch.arange(n) + first for n, first in zip(counts, firsts.tolist(), strict=True)])


def one_by_one(native, ids, positions, cache, settings, rope, counts) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same tokens, one a row in a step: rows that have none left wait."""
    logits, experts = {}, {}
    for t in range(max(counts)):
        now = [int(t < n) for n in counts]
        at = [sum(counts[:row]) + t for row, n in enumerate(now) if n]
        part = None if settings is None else settings[at]
        out, chosen = native(ids[at], positions[at], cache, part, rope, counts=now)
        logits |= dict(zip(at, out, strict=True))
        experts |= {} if chosen is None else dict(zip(at, chosen.T, strict=True))
    found = torch.stack([experts[i] for i in range(len(ids))], 1) if experts else None
    return torch.stack([logits[i] for i in range(len(ids))]), found


def check(weights, lengths, counts, *, settings=None, dtype=torch.float32, tolerance=2e-6, groups=(), bits=8):
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq, weights.rope_scale)
    base = filled(weights, lengths, dtype)
    caches = [copied(base, *groups) for _ in range(3)]
    if groups:
        for cache in caches:
            cache.body.bits = bits
    ids, positions = tokens_of(counts, base.lengths - base.starts)
    ours, experts = native(ids, positions, caches[0], settings, rope, counts=counts)
    wanted, chosen = plain.step(weights, ids, positions, caches[1], settings, rope, counts)
    assert distance(ours, wanted) < tolerance
    assert (experts is None) == (chosen is None) == (settings is None)
    stepped, again = one_by_one(native, ids, positions, caches[2], settings, rope, counts)
    assert torch.equal(ours, stepped)
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    for one, other in ((caches[0].keys, caches[2].keys), (caches[0].values, caches[2].values)):
        assert torch.equal(one, other)
    if settings is not None:
        assert torch.equal(experts, chosen)
        assert torch.equal(experts, again)
        assert len(experts.unique()) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family):
    check(packed(tiny_model(family), "fp32"), (9, 4, 300, 1), COUNTS)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format(format):
    check(packed(tiny_model(), format), (255, 4, 513, 1), COUNTS, tolerance=TOLERANCE[format])


def test_a_window():
    weights = packed(tiny_model("mistral"), "fp32")
    layers = tuple(type(layer)(**vars(layer) | {"window": 7}) for layer in weights.layers)
    check(type(weights)(**vars(weights) | {"layers": layers}), (9, 4, 258, 1), COUNTS)


@pytest.mark.parametrize("target", ["damage", "class"])
def test_a_dial_for_each_token(target):
    settings = torch.tensor([0.0, 0.02, 0.02, 0.3, 0.6, 0.9, 0.9, 1.0, 0.1])
    check(packed(routed(target), "fp32"), (9, 4, 30, 1), COUNTS, settings=settings)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [(16, 0), (5, 0), (128, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_behind_a_body_in_planes(groups, bits, dtype):
    tolerance = 4e-6 if dtype == torch.float32 else 2e-3
    lengths = (40, 9, 700, 33)
    check(packed(tiny_model(), "fp32"), lengths, COUNTS, groups=groups, bits=bits, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(
    ("dim", "groups"), [(64, (32, 32)), (64, (128, 16)), (80, (48, 16)), (128, (128, 0)), (20, (24, 0))]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_heads_and_groups_of_other_widths(monkeypatch, dim, groups, bits):
    monkeypatch.setitem(tiny.SIZES, "head_dim", dim)
    check(packed(tiny_model("qwen3"), "fp32"), (300, 9, 261, 33), COUNTS, groups=groups, bits=bits, tolerance=4e-6)


def test_a_body_reads_the_bytes_that_the_cost_model_says():
    cache = filled(packed(tiny_model(), "fp32"), (130, 20, 70), torch.float16)
    cache.starts.zero_()
    layers, _, heads, _, dim = cache.keys.shape
    planes = PlaneCache.of(cache, 16)
    full = 2 * layers * heads * dim * 2 * int(planes.body.lengths.sum())
    block = 2 * 16 * 16 // 2  # nibbles of a group of 16 tokens: heads of 8 channels take the room of 16
    for bits in (8, 4):
        saved = layers * sum(saved_bytes(n, heads, dim, (16, dim), bits, 2) for n in planes.body.lengths.tolist())
        padding = layers * heads * int(planes.body.groups.sum()) * (block - 2 * 16 * dim // 2) * (bits // 4)
        assert planes.body.read_bytes(bits) == full - saved + padding


def test_numbers_of_tokens_that_do_not_add_up_are_refused():
    weights = packed(tiny_model(), "fp32")
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq)
    ids = torch.tensor([5, 6])
    for counts in ((1, 2), (3, -1)):
        with pytest.raises(SettingError, match="counts="):
            native(ids, ids, filled(weights, (4, 4)), None, rope, counts=counts)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [(), (16, 0)])
def test_a_draft_in_one_call_is_steps_in_a_row(kind, groups):
    """Tokens, cache and experts, with a row that waits and a dial for each token."""
    weights = packed(routed("damage"), "fp32")
    table = torch.randn(weights.embedding.shape, generator=torch.Generator().manual_seed(3)).to(kind)
    weights = type(weights)(**vars(weights) | {"embedding": table})  # not the head's twin, which would repeat itself
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq, weights.rope_scale)
    base = filled(weights, (40, 9, 70))
    counts, settings, number = [1, 0, 1], torch.tensor([0.02, 0.3]), 6
    ids, positions = torch.tensor([5, 9]), (base.lengths - base.starts)[[0, 2]].long()
    caches = [copied(base, *groups) for _ in range(2)]
    drafted = torch.empty(number, 2, dtype=torch.int64)
    _, experts = native(ids, positions, caches[0], settings, rope, counts=counts, drafted=drafted)
    newest, tokens, chosen = ids, [], []
    for i in range(number):
        logits, one = native(newest, positions + i, caches[1], settings, rope, counts=counts)
        newest = most_likely(logits)
        tokens.append(newest)
        chosen.append(one)
    assert torch.equal(drafted, torch.stack(tokens))
    assert len(drafted.unique()) > 3
    assert torch.equal(experts, torch.stack(chosen))
    for name in ("keys", "values", "lengths"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name))


def test_drafts_of_several_tokens_a_row_are_refused():
    weights = packed(tiny_model(), "fp32")
    native, rope = NativeDecoder(kernels.library(), weights), RopeTable(weights.inv_freq)
    ids, drafted = torch.tensor([5, 6]), torch.empty(3, 2, dtype=torch.int64)
    with pytest.raises(SettingError, match="drafted="):
        native(ids, ids, filled(weights, (4,)), None, rope, counts=[2], drafted=drafted)
    with pytest.raises(SettingError, match="drafted="):
        native(ids, ids, filled(weights, (4, 4)), None, rope, drafted=drafted.int())
