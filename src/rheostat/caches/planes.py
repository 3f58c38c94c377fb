"""Two nibble planes: 4-bit numbers, and 8-bit numbers, read from the same bytes. Pure functions, plain PyTorch.

One group x of numbers shares a zero point Z = min(x) and a scale S = (max(x) - min(x)) / 15:

    upper  U = round((x - Z) / S), 0..15                 4-bit view  U S + Z
    lower  L = round((x - (U S + Z)) / (S / 16)), -8..7  8-bit view  (16 U + L) S / 16 + Z

As published (arXiv 2502.10424). Our choice is the carry: what would need L = 8 becomes U + 1 and L = -8, the same
number, so that the 8-bit view is within half a step everywhere. The lower plane is stored as L + 8. Two nibbles share
a byte along the last axis, the first in the low half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rheostat.errors import bad_setting

LEVELS = 15
"""Largest value of a nibble."""


@dataclass(frozen=True)
class Planes:
    """Quantised numbers [..., N]: packed nibbles [..., N / 2] and one scale and zero point for each group."""

    upper: torch.Tensor
    """uint8, two unsigned nibbles a byte."""
    lower: torch.Tensor | None
    """The same for the lower plane; None when only 4 bits are kept."""
    scale: torch.Tensor
    """One a group, in the dtype of the numbers, and shaped to be spread over them by `spread`."""
    zero: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Upper, lower (if there is one), scale and zero."""
        return [t for t in (self.upper, self.lower, self.scale, self.zero) if t is not None]

    def without_lower(self) -> Planes:
        """The upper plane alone: a complete 4-bit copy."""
        return replace(self, lower=None)


def pack(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles [..., N] (0..15, N even) -> bytes [..., N / 2], uint8."""
    pairs = nibbles.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: [..., N / 2] -> [..., N], uint8."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def quantise(x: torch.Tensor, axis: int, group_size: int) -> Planes:
    """Quantise x [..., N] in groups of `group_size` neighbours along `axis` (-1 or -2).

    Args:
        x: the last axis must be even, and `axis` a multiple of `group_size`.

    Raises:
        SettingError: the group size does not divide the axis.
    """
    _check_groups(x, axis, group_size)
    work = _working_dtype(x.dtype)
    low, high = _groups(x, axis, group_size).aminmax(dim=axis, keepdim=False)
    scale = ((high.to(work) - low.to(work)) / LEVELS).to(x.dtype)
    # Against scale and zero as stored: otherwise the lower plane corrects a residual that no reader sees.
    step, zero = (spread(t.to(work), axis, group_size) for t in (scale, low))
    safe = torch.where(step > 0, step, 1)  # a constant group, or one whose scale is too small for the dtype
    wide = x.to(work)
    upper = ((wide - zero) / safe).round().clamp(0, LEVELS)
    lower = ((wide - (upper * step + zero)) / (safe / 16)).round()
    carried = (lower > 7) & (upper < LEVELS)
    upper, lower = torch.where(carried, upper + 1, upper), torch.where(carried, -8, lower.clamp(-8, 7))
    return Planes(pack(upper), pack(lower + 8), scale, low)


def dequantise(planes: Planes, axis: int, group_size: int, bits: int) -> torch.Tensor:
    """Read `planes` as [..., N] in the dtype of their scale.

    Args:
        bits: 4 reads the upper plane only, 8 reads both.
    """
    dtype = planes.scale.dtype
    work = _working_dtype(dtype)
    scale, zero = (spread(t.to(work), axis, group_size) for t in (planes.scale, planes.zero))
    codes = unpack(planes.upper).to(work)
    if bits == 4:
        return (codes * scale + zero).to(dtype)
    assert planes.lower is not None
    codes = codes * 16 + (unpack(planes.lower).to(work) - 8)
    return (codes * (scale / 16) + zero).to(dtype)


def spread(per_group: torch.Tensor, axis: int, group_size: int) -> torch.Tensor:
    """One number a group -> one a number, along `axis`."""
    return per_group.repeat_interleave(group_size, dim=axis)


def _groups(x: torch.Tensor, axis: int, group_size: int) -> torch.Tensor:
    """[..., groups, group_size] for the last axis, [..., groups, group_size, d] for the one before it."""
    return x.unflatten(axis, (-1, group_size))


def _check_groups(x: torch.Tensor, axis: int, group_size: int) -> None:
    if group_size < 1 or x.shape[axis] % group_size:
        raise bad_setting("group_size", group_size, f"a divisor of {x.shape[axis]}")
    if x.shape[-1] % 2:
        raise bad_setting("head width", x.shape[-1], "even: two nibbles share a byte")


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: half precision would round the codes."""
    return dtype if dtype == torch.float64 else torch.float32
