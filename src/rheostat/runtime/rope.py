"""Rotary positions: tables of cosine and sine that grow when they are outgrown."""

from __future__ import annotations

import torch

FIRST = 1024
"""Positions in a new table."""


class RopeTable:
    """Cosine and sine [P, r / 2] float32 of positions 0 to P - 1."""

    def __init__(self, inv_freq: torch.Tensor, scale: float = 1.0) -> None:
        self.inv_freq, self.scale = inv_freq.float(), scale
        self.cos = self.sin = torch.empty(0, len(inv_freq))
        self.reserve(FIRST)

    def reserve(self, num_positions: int) -> None:
        """Hold at least this many positions."""
        have = len(self.cos)
        if num_positions <= have:
            return
        angles = torch.outer(torch.arange(max(num_positions, 2 * have), dtype=torch.float32), self.inv_freq)
        self.cos, self.sin = angles.cos() * self.scale, angles.sin() * self.scale

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [..., r / 2] at positions [...]."""
        self.reserve(int(positions.max()) + 1)
        return self.cos[positions], self.sin[positions]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads x [B, T, heads, d] turned by angles [B, T, r / 2]; channels after the first r stay as they are."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)
