"""Tokens that move to a body in nibble planes: in native code the bytes of the plain twin."""

from __future__ import annotations

import pytest
import torch

from rheostat import kernels
from rheostat.kernels.settling import can_settle
from rheostat.runtime import planes
from rheostat.runtime.cache import KVCache
from rheostat.runtime.planes import PlaneBody, PlaneCache

native = pytest.mark.skipif(kernels.library() is None, reason="no native code here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS, ROWS, HEADS = 2, 3, 2


def filled(dim: int, lengths: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> KVCache:
    """Random keys and values; some channels alike everywhere, some far out, some tokens alike in all channels."""
    cache = KVCache(num_layers=LAYERS, num_rows=len(lengths), num_kv_heads=HEADS, head_dim=dim, dtype=dtype)
    cache.reserve(max(lengths))
    generator = torch.Generator().manual_seed(seed)
    for states in (cache.keys, cache.values):
        states.copy_(torch.randn(states.shape, generator=generator))
        states[..., 1] *= 300
        states[..., 3] = 1e-6 * states[..., 3]
        states[..., dim // 2] = 0.7
        states[:, :, :, 2::7] = 0.25
    cache.lengths.copy_(torch.tensor(lengths))
    return cache


def made(monkeypatch, is_native: bool, *given) -> PlaneCache:
    """A cache in planes, which `KVCache` begins and whose buffer then grows until it settles twice."""
    used = []
    with monkeypatch.context() as patch:
        if not is_native:
            patch.setattr(planes, "library", lambda: None)
        patch.setattr(planes, "settle", lambda *args: (used.append(args), kernels.settling.settle(*args)))
        cache = PlaneCache.of(*given)
        for seed in (1, 2):
            more = filled(cache.keys.shape[4], (2 * given[1] + 3,) * ROWS, cache.dtype, seed)
            for name in ("keys", "values"):
                new = getattr(more, name)
                cache.reserve(int(cache.lengths.max()) + given[1] + 1)
                for row, n in enumerate(cache.lengths.tolist()):
                    getattr(cache, name)[:, row, :, n : n + given[1] + 1] = new[:, row, :, : given[1] + 1]
            cache.advance(given[1] + 1)
            cache.settle()
    assert bool(used) == is_native
    return cache


@native
@pytest.mark.parametrize(
    ("dim", "group", "value_group"),
    [(64, 128, 0), (64, 32, 32), (20, 5, 0), (8, 16, 0), (80, 24, 16), (128, 48, 0), (250, 9, 0)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_of_the_plain_twin(monkeypatch, dtype, dim, group, value_group):
    base = filled(dim, (5 * group + 3, group, 2 * group), dtype)
    ours, wanted = (made(monkeypatch, is_native, base, group, value_group) for is_native in (True, False))
    assert ours.body.groups.tolist() == wanted.body.groups.tolist()
    assert min(wanted.body.groups.tolist()) > 0
    for name in ("upper", "lower", "scales"):
        assert torch.equal(getattr(ours.body, name), getattr(wanted.body, name)), name
    assert len(wanted.body.upper.unique()) > 100
    assert ours.lengths.tolist() == wanted.lengths.tolist()
    for row, n in enumerate(wanted.lengths.tolist()):
        for name in ("keys", "values"):
            assert torch.equal(getattr(ours, name)[:, row, :, :n], getattr(wanted, name)[:, row, :, :n]), name


@native
def test_ties_and_least_numbers_fall_as_in_pytorch(monkeypatch):
    """Halves of both nibbles' steps, and ranges whose scale is subnormal in sixteen bits, or nothing."""
    for dtype in DTYPES:
        base = filled(16, (32,) * ROWS, dtype)
        steps = torch.arange(16).float()
        for states in (base.keys, base.values):
            states[0] = (steps * torch.arange(base.num_slots)[:, None] * 7 % 481 / 32).to(
                dtype
            )  # 0 to 15 in halves of 1/16
            states[1] = (torch.rand(states[1].shape, generator=torch.Generator().manual_seed(3)) * 3e-6).to(dtype)
            states[1, :, :, :, 5] *= 1e-3
        bodies = []
        for code in (kernels.library(), None):
            monkeypatch.setattr(planes, "library", lambda code=code: code)
            bodies.append(PlaneCache.of(base, 16).body)
        for name in ("upper", "lower", "scales"):
            assert torch.equal(getattr(bodies[0], name), getattr(bodies[1], name)), (dtype, name)


@native
def test_any_number_of_threads_writes_the_same(monkeypatch):
    base, before = filled(64, (300,) * ROWS, torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ours = made(monkeypatch, True, base, 16)
    finally:
        torch.set_num_threads(before)
    wanted = made(monkeypatch, True, base, 16)
    for name in ("upper", "lower", "scales"):
        assert torch.equal(getattr(ours.body, name), getattr(wanted.body, name))


def test_what_cannot_be_read_natively_is_known():
    body = PlaneBody((LAYERS, ROWS, HEADS, 16), 4, 16, torch.float32, 1)
    x = torch.zeros(LAYERS, HEADS, 4, 16)
    assert can_settle(body, x, x)
    assert not can_settle(body, x.half(), x.half())
    assert not can_settle(body, x, x.transpose(2, 3).contiguous().transpose(2, 3))
    assert not can_settle(body, x, torch.zeros(LAYERS, HEADS, 5, 16)[:, :, :4])
    wide = PlaneBody((LAYERS, ROWS, HEADS, 16), 4, 16, torch.float64, 1)
    assert not can_settle(wide, x.double(), x.double())
