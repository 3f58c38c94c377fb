"""Keys and values of a batch, in memory that is there before it is needed and doubles when it is outgrown.

Layout: `keys` and `values` are [L, B, K, S, d], S being the allocated slots; a layer's part is contiguous. Row b holds
its tokens in slots `starts[b]` to `lengths[b] - 1`; the slots before are left padding and are never read.
"""

from __future__ import annotations

from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.memory import zeros

UNLIMITED = 1 << 30
"""Tokens, of a cache that sets no limit."""

SMALLEST = 64
"""Slots of a new cache at least."""


class KVCache:
    """Keys and values of L layers for B rows."""

    keys: torch.Tensor
    """[L, B, K, S, d]; after `reserve` a new tensor."""
    values: torch.Tensor
    """[L, B, K, S, d]."""
    lengths: torch.Tensor
    """[B] int32: the slot that each row's next token goes to."""
    starts: torch.Tensor
    """[B] int32: each row's first slot that is not padding."""
    body: Any = None
    """What comes before the slots, where it is kept in fewer bits."""
    plans: dict[Any, Any]
    """What each native decoder worked out about this memory, kept for its next step."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int = SMALLEST,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_rows < 1:
            raise bad_setting("num_rows", num_rows, "1 or more")
        shape = (num_layers, num_rows, num_kv_heads, max(num_slots, SMALLEST), head_dim)
        # Zeros, not garbage: a NaN in a slot that is masked out would still poison a weighted sum.
        self.keys, self.values = zeros(shape, dtype), zeros(shape, dtype)
        self.lengths = torch.zeros(num_rows, dtype=torch.int32)
        self.starts = torch.zeros(num_rows, dtype=torch.int32)
        self.plans = {}

    @property
    def num_rows(self) -> int:
        """B."""
        return self.keys.shape[1]

    @property
    def num_slots(self) -> int:
        """S, allocated."""
        return self.keys.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        layers, _, heads, _, width = self.keys.shape
        return 2 * layers * heads * width * self.keys.element_size() * int((self.lengths - self.starts).sum())

    def reserve(self, num_slots: int) -> None:
        """Have room for `num_slots` tokens a row in all; grows to at least twice the size when it has to grow."""
        have = self.num_slots
        if num_slots <= have:
            return
        used = int(self.lengths.max())
        self.keys = _grown(self.keys, max(num_slots, 2 * have), used)
        self.values = _grown(self.values, max(num_slots, 2 * have), used)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values [B, T, K, d] after each row's tokens; `advance` is called once all layers have."""
        num_tokens = keys.shape[1]
        lengths = self.lengths.tolist()
        self.reserve(max(lengths) + num_tokens)
        for place, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if len(set(lengths)) == 1:
                place[:, :, lengths[0] : lengths[0] + num_tokens] = new.transpose(1, 2)
                continue
            for row, length in enumerate(lengths):
                place[row, :, length : length + num_tokens] = new[row].transpose(0, 1)

    def advance(self, num_tokens: int | torch.Tensor) -> None:
        """Count `num_tokens` more (one number, or [B]), which all layers have written."""
        self.lengths += num_tokens

    def above(self, layer: int) -> KVCache:
        """The layers from `layer` on, on the same memory as long as it need not grow; lengths are shared."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[layer:], self.values[layer:]
        view.lengths, view.starts, view.plans = self.lengths, self.starts, {}
        return view

    def truncate(self, lengths: torch.Tensor | list[int] | int) -> None:
        """Go back to these `lengths` (one for all rows, or [B]): what came after is forgotten.

        Raises:
            SettingError: a row has fewer, or its start lies beyond.
        """
        have, starts = self.lengths.tolist(), self.starts.tolist()
        wanted = lengths if isinstance(lengths, list) else torch.as_tensor(lengths).expand(len(have)).tolist()
        if any(not start <= one <= most for start, one, most in zip(starts, wanted, have, strict=True)):
            raise bad_setting("lengths", wanted, f"from {starts} to {have}")
        self.lengths = torch.tensor(wanted, dtype=torch.int32)

    def contents(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values [B, K, S, d] of a layer, and in which column [B] each row's slot 0 is."""
        return self.keys[layer], self.values[layer], torch.zeros_like(self.lengths)

    def room(self) -> list[int]:
        """For each row, how many tokens after the next one a pass may check and be sure that it reads what a pass of
        one token would read: no limit."""
        return [UNLIMITED] * self.num_rows

    def settle(self) -> None:
        """Nothing will be taken back of what is held now: a cache that quantises as it grows may do so."""

    def fill(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], starts: torch.Tensor) -> None:
        """Take over keys and values [B, K, S, d] of every layer, left-padded: row b begins at slot `starts[b]`."""
        num_tokens = pairs[0][0].shape[2]
        self.reserve(num_tokens)
        for layer, (keys, values) in enumerate(pairs):
            self.keys[layer, :, :, :num_tokens] = keys
            self.values[layer, :, :, :num_tokens] = values
        self.lengths.fill_(num_tokens)
        self.starts.copy_(starts)


def _grown(old: torch.Tensor, num_slots: int, used: int) -> torch.Tensor:
    new = zeros((*old.shape[:3], num_slots, old.shape[4]), old.dtype)
    new[:, :, :, :used] = old[:, :, :, :used]
    return new
