"""Two nibble planes: ranges, error bounds, one copy in the other, awkward groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.caches.planes import dequantise, pack, quantise, spread, unpack
from rheostat.errors import SettingError

AXES = (-1, -2)


def numbers(rows: int = 64, width: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(st.integers(1, 33), st.integers(0, 1000))
def test_packing_is_undone_by_unpacking(pairs, seed):
    nibbles = torch.randint(0, 16, (3, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(nibbles)
    assert packed.shape == (3, pairs)
    assert torch.equal(unpack(packed), nibbles)
    assert torch.equal(packed[:, 0] & 15, nibbles[:, 0])  # the first in the low half


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("group", [2, 16, 64])
def test_errors_are_within_half_a_step(axis, group):
    x = numbers()
    planes = quantise(x, axis, group)
    step = spread(planes.scale, axis, group)
    coarse, fine = (dequantise(planes, axis, group, bits) for bits in (4, 8))
    assert ((x - coarse).abs() <= step * (0.5 + 1 / 32) * (1 + 1e-9)).all()  # the carry may move U by a step
    assert ((x - fine).abs() <= step / 32 * (1 + 1e-9)).all()
    share = (x - coarse).pow(2).mean().sqrt() / (x - fine).pow(2).mean().sqrt()
    assert 14 < share < 18 or group == 2  # of two numbers, both are exact


def test_the_carry_only_moves_what_the_lower_plane_cannot_hold():
    x = numbers(128)
    planes = quantise(x, -2, 128)
    upper, lower = unpack(planes.upper).double(), unpack(planes.lower).double() - 8
    step, zero = (spread(t, -2, 128) for t in (planes.scale, planes.zero))
    nearest = ((x - zero) / step).round().clamp(0, 15)
    moved = upper != nearest
    assert moved.any()
    assert (lower[moved] == -8).all()
    assert (upper[moved] == nearest[moved] + 1).all()
    worst = ((x - dequantise(planes, -2, 128, 4)).abs() / step)[~moved].max()
    assert worst <= 0.5 + 1e-9


@pytest.mark.parametrize("axis", AXES)
def test_least_and_largest_of_a_group_are_exact(axis):
    x = numbers()
    seen = dequantise(quantise(x, axis, 16), axis, 16, 4)
    low, high = x.unflatten(axis, (-1, 16)).aminmax(dim=axis)
    mine = seen.unflatten(axis, (-1, 16)).aminmax(dim=axis)
    torch.testing.assert_close(mine.min, low, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.max, high, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_upper_plane_alone_is_the_four_bit_copy(axis, dtype):
    planes = quantise(numbers(dtype=dtype), axis, 16)
    empty = torch.full_like(planes.upper, 8 | 8 << 4)
    as_eight = dequantise(type(planes)(planes.upper, empty, planes.scale, planes.zero), axis, 16, 8)
    four = dequantise(planes, axis, 16, 4)
    assert torch.equal(as_eight, four)
    assert torch.equal(dequantise(planes.without_lower(), axis, 16, 4), four)
    assert four.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 60000.0, 6e-8])
def test_constant_groups_and_outliers_stay_finite(dtype, value):
    constant = torch.full((1, 1, 4, 8), value).to(dtype)
    outlier = constant.clone()
    outlier[..., 3] = -value
    for x in (constant, outlier):
        for bits in (4, 8):
            seen = dequantise(quantise(x, -1, 8), -1, 8, bits)
            assert torch.isfinite(seen).all()
            torch.testing.assert_close(seen.float(), x.float(), rtol=0.02, atol=2e-7)
    assert torch.equal(dequantise(quantise(constant, -1, 8), -1, 8, 8), constant)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_groups_do_not_mix(first, second, seed):
    x = numbers(4 * (first + second), 8, seed)
    whole = quantise(x, -2, 4)
    parts = quantise(x[:, :, : 4 * first], -2, 4), quantise(x[:, :, 4 * first :], -2, 4)
    for t, a, b in zip(whole.tensors(), parts[0].tensors(), parts[1].tensors(), strict=True):
        assert torch.equal(t, torch.cat([a, b], 2))
    for t, row in zip(quantise(x, -1, 4).tensors(), quantise(x[:, :, 1:2], -1, 4).tensors(), strict=True):
        assert torch.equal(t[:, :, 1:2], row)


def test_bytes():
    planes = quantise(numbers(128, 128, dtype=torch.bfloat16), -2, 128)
    assert planes.num_bytes * 8 / (2 * 3 * 128 * 128) == 8 + 32 / 128
    assert planes.without_lower().num_bytes * 8 / (2 * 3 * 128 * 128) == 4 + 32 / 128


@pytest.mark.parametrize("size", [0, -1, 5, 128])
def test_a_group_size_that_does_not_divide_names_itself(size):
    with pytest.raises(SettingError, match=f"group_size={size}: must be a divisor of 64"):
        quantise(numbers(), -2, size)


def test_an_odd_width_is_refused():
    with pytest.raises(SettingError, match="head width=7: must be even"):
        quantise(numbers(width=7), -2, 4)
