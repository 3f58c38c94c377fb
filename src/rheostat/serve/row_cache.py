"""A cache whose rows come and go between steps."""

from __future__ import annotations

import math

import numpy as np
import torch

from rheostat.runtime.cache import SMALLEST, KVCache
from rheostat.runtime.engine import Runtime


class RowCache(KVCache):
    """A cache with room for more rows than it shows: rows come and go without the others being copied.

    `keys` and `values` are views of the rows in use, [L, B, K, S, d], in which each layer's part is contiguous.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            num_layers=len(runtime.weights.layers),
            num_rows=1,
            num_kv_heads=runtime.weights.num_kv_heads,
            head_dim=runtime.weights.head_dim,
            dtype=runtime.cache_dtype,
        )
        self._keys, self._values = self.keys, self.values
        self._show(0)

    @property
    def allocated(self) -> int:
        """Bytes held, used or not."""
        return self._keys.nbytes + self._values.nbytes

    def reserve(self, num_slots: int) -> None:
        """As `KVCache.reserve`, the hidden rows included."""
        if num_slots > self.num_slots:
            self._grow(max(1, len(self.lengths)), max(num_slots, 2 * self.num_slots))

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A new row at the end, with keys and values [L, K, S, d]."""
        count, length = len(self.lengths), keys.shape[2]
        num_rows, num_slots = self._keys.shape[1], self.num_slots
        if count == num_rows or length > num_slots:
            self._grow(num_rows if count < num_rows else 2 * count, max(length, num_slots))
        self._keys[:, count, :, :length] = keys
        self._values[:, count, :, :length] = values
        self.lengths = torch.cat([self.lengths, torch.tensor([length], dtype=torch.int32)])
        self._show(count + 1)

    def drop(self, row: int) -> None:
        """Free a row; the last one takes its place. Without rows, the memory goes back too."""
        last = len(self.lengths) - 1
        if row != last:
            used = int(self.lengths[last])
            self._keys[:, row, :, :used] = self._keys[:, last, :, :used]
            self._values[:, row, :, :used] = self._values[:, last, :, :used]
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last].clone()
        if not last:
            num_layers, _, num_heads, _, width = self._keys.shape
            small = (num_layers, 1, num_heads, SMALLEST, width)
            self._keys, self._values = _zeros(small, self.dtype), _zeros(small, self.dtype)
        self._show(last)

    def only(self, row: int) -> KVCache:
        """One row by itself, on the same memory as long as it need not grow."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        view.lengths, view.starts, view.plans = self.lengths[row : row + 1], self.starts[row : row + 1], {}
        return view

    def _show(self, count: int) -> None:
        self.keys, self.values = self._keys[:, :count], self._values[:, :count]
        self.lengths = self.lengths[:count]
        self.starts = torch.zeros(count, dtype=torch.int32)
        self.plans = {}  # which would keep the memory of before alive

    def _grow(self, num_rows: int, num_slots: int) -> None:
        shown, used = len(self.lengths), int(self.lengths.max()) if len(self.lengths) else 0
        num_layers, _, num_heads, _, width = self._keys.shape
        made = []
        for old in (self._keys, self._values):  # both or, where memory runs out, none
            new = _zeros((num_layers, num_rows, num_heads, num_slots, width), old.dtype)
            new[:, :shown, :, :used] = old[:, :shown, :, :used]
            made.append(new)
        self._keys, self._values = made
        self._show(shown)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only once they are written: `torch.zeros` writes them at once, and a batch that grows
    would wait for slots that it may never use."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
