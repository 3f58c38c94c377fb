"""The quantised part of a hierarchical cache: it only ever grows, by whole groups."""

from __future__ import annotations

import torch

from rheostat.caches.planes import Planes, dequantise, quantise


class Body:
    """Numbers [B, K, n, d] of all rows, in groups along `axis` (-2: of tokens, -1: of channels)."""

    def __init__(self, axis: int, group_size: int, num_planes: int) -> None:
        self.axis, self.group_size, self.num_planes = axis, group_size, num_planes
        self.tensors: list[torch.Tensor] = []
        """Upper plane, lower plane (with two), scale and zero, as in `Planes`; rows are filled from place 0 on."""

    @property
    def num_bytes(self) -> int:
        """Of all that is stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def put(self, rows: list[int], num_rows: int, start: int, states: torch.Tensor) -> None:
        """Quantise `states` [rows, K, n, d] and store them from token `start` on. Of `num_rows` rows in all."""
        planes = quantise(states, self.axis, self.group_size)
        new = (planes if self.num_planes == 2 else planes.without_lower()).tensors()
        old = self.tensors or [t.new_zeros(num_rows, t.shape[1], 0, t.shape[3]) for t in new]
        units = [self._tokens_per_entry(i) for i in range(len(new))]
        self.tensors = [_put(o, n, rows, start // u) for o, n, u in zip(old, new, units, strict=True)]

    def read(self, bits: int) -> torch.Tensor:
        """[B, K, n, d] as 8-bit or as 4-bit numbers."""
        upper, *lower, scale, zero = self.tensors
        planes = Planes(upper, lower[0] if lower else None, scale, zero)
        return dequantise(planes, self.axis, self.group_size, bits)

    def select(self, rows: list[int], num_tokens: int) -> None:
        """Keep these rows, in this order, and the first `num_tokens` tokens: as many as the longest of them has."""
        self.tensors = [resized(t[rows], num_tokens // self._tokens_per_entry(i)) for i, t in enumerate(self.tensors)]

    def join(self, others: list[Body], num_rows: list[int]) -> None:
        """Take in the rows of `others` after its own. Of `num_rows` rows each, its own first; where a body is empty, it
        has no tensors to tell."""
        bodies = [self, *others]
        filled = next((one.tensors for one in bodies if one.tensors), [])
        joined = []
        for i, like in enumerate(filled):
            parts = [
                one.tensors[i] if one.tensors else like.new_zeros(n, like.shape[1], 0, like.shape[3])
                for one, n in zip(bodies, num_rows, strict=True)
            ]
            joined.append(cat_rows(parts))
        self.tensors = joined

    def _tokens_per_entry(self, i: int) -> int:
        is_per_group = i >= self.num_planes
        return self.group_size if is_per_group and self.axis == -2 else 1


def resized(x: torch.Tensor, length: int) -> torch.Tensor:
    """x [B, K, n, d] with n made `length`: zeros are added at the end, or the end is let go."""
    if x.shape[2] >= length:
        return x if x.shape[2] == length else x[:, :, :length].clone()
    more = x.new_zeros(*x.shape[:2], length - x.shape[2], x.shape[3])
    return torch.cat([x, more], 2)


def cat_rows(parts: list[torch.Tensor]) -> torch.Tensor:
    """[B, K, n, d] of each part, one after the other, with the n of the longest."""
    longest = max(one.shape[2] for one in parts)
    return torch.cat([resized(one, longest) for one in parts])


def _put(old: torch.Tensor, new: torch.Tensor, rows: list[int], start: int) -> torch.Tensor:
    stop = start + new.shape[2]
    grown = resized(old, max(stop, old.shape[2]))
    grown[rows, :, start:stop] = new
    return grown
