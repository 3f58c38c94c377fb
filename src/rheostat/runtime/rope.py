"""Rotary positions: tables of cosine and sine that grow when they are outgrown."""

from __future__ import annotations

import torch

FIRST = 1024
"""Positions in a new table."""


class RopeTable:
    """Cosine and sine [P, r / 2] float32 of positions 0 to P - 1."""

    def __init__(self, inv_freq: torch.Tensor, scale: float = 1.0) -> None:
        self.inv_freq, self.scale = inv_freq.float(), scale
        self.cos_sin = torch.empty(2, 0, len(inv_freq))
        """[2, P, r / 2]; one tensor, replaced whole, so that a thread never sees the one grown and the other not."""
        self.reserve(FIRST)

    def reserve(self, num_positions: int) -> torch.Tensor:
        """Hold at least this many positions. Returns `cos_sin`."""
        have = self.cos_sin
        if num_positions > have.shape[1]:
            places = torch.arange(max(num_positions, 2 * have.shape[1]), dtype=torch.float32)
            angles = torch.outer(places, self.inv_freq)
            have = self.cos_sin = torch.stack([angles.cos(), angles.sin()]) * self.scale
        return have

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [..., r / 2] at positions [...]."""
        table = self.reserve(int(positions.max()) + 1)
        return table[0, positions], table[1, positions]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads x [B, T, heads, d] turned by angles [B, T, r / 2]; channels after the first r stay as they are."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)
