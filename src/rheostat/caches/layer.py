"""One layer of a hierarchical cache: rows that differ in padding and length, a body that grows, a buffer that flushes.

`hierarchical` has the rules.
"""

from __future__ import annotations

from typing import Any

import torch

from rheostat.caches.body import Body, cat_rows, resized
from rheostat.caches.counting import body_length, saved_bytes
from rheostat.caches.rewinding import RewindableLayer

SPARE = 8
"""Places in the buffer beyond 2G, for drafted tokens; it grows when a draft is longer."""


class HierarchicalLayer(RewindableLayer):
    """Keys and values of one layer. Rows may differ in padding and in how many tokens they hold.

    Each row's tokens are stored from place 0 of the body and of the buffer on; a reader gets them aligned on the right.
    """

    supports_early_init = False  # the padding has to be known first

    def __init__(self, group_size: int, value_group_size: int, *, num_planes: int = 2) -> None:
        super().__init__()
        self.group_size, self.value_group_size, self.num_planes = group_size, value_group_size, num_planes
        self.bits = 4 * num_planes
        """What a reader of the body sees: 8 or 4."""
        self.record_past = False
        self.is_remembering = False
        self.reset()

    # -- the host's verbs

    def reset(self) -> None:
        """Empty, as new; what was known of padding is forgotten."""
        self.is_initialized = False
        self.num_columns = 0
        self.padding: list[int] = []
        self.body_lengths: list[int] = []
        self._body = (Body(-2, self.group_size, self.num_planes), Body(-1, self.value_group_size, self.num_planes))
        self._buffer: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self._read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take rows, heads, widths, dtype and device from the first keys and values [B, K, T, d]."""
        num_rows = key_states.shape[0]
        self.padding = self.padding or [0] * num_rows
        self.body_lengths = [0] * num_rows
        self._buffer = (key_states[:, :, :0], value_states[:, :, :0])
        self._resize(2 * self.group_size + SPARE)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values [B, K, T, d] and return all [B, K, S, d], as the reader is to see them.

        What comes into an empty cache is a prompt, and is read back in full precision.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_prompt = self.num_columns == 0
        if is_prompt:
            self._take_prompt(key_states, value_states)
            return key_states, value_states
        self._append(key_states, value_states)
        seen = self.contents()
        if not self.record_past:
            self.flush()
        return seen

    def get_seq_length(self) -> int:
        """Columns, padding included."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: every column is there."""
        return self.num_columns + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def activate_past_recording(self) -> None:
        """From now on new tokens may be taken back: nothing moves to the body until `crop` says what stays."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take `-tokens_to_remove` columns back from every row; what is left stays.

        Raises:
            ValueError: they are older than the buffer, or the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of tokens to remove, not {tokens_to_remove}")
        if not self.is_initialized:
            return
        self.num_columns += tokens_to_remove
        self._check_body(tokens_to_remove)
        self.flush()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        if not self.is_initialized:
            return
        rows = indices.tolist() if indices.dtype != torch.bool else indices.nonzero().flatten().tolist()
        self.padding = [self.padding[row] for row in rows]
        self.body_lengths = [self.body_lengths[row] for row in rows]
        self._buffer = (self._buffer[0][rows], self._buffer[1][rows])
        for body in self._body:
            body.select(rows, max(self.body_lengths, default=0))  # `contents` takes it to end where the longest does
        self._read = {}

    # -- ours

    def join(self, others: list[Any]) -> None:
        """Take in the rows of `others`, which hold as many columns, after its own."""
        layers = [self, *others]
        num_rows = [len(one.padding) for one in layers]
        self._buffer = (cat_rows([one._buffer[0] for one in layers]), cat_rows([one._buffer[1] for one in layers]))
        for i, body in enumerate(self._body):
            body.join([one._body[i] for one in others], num_rows)
        self.padding = [n for one in layers for n in one.padding]
        self.body_lengths = [n for one in layers for n in one.body_lengths]
        self._read = {}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, padding left out."""
        return [max(0, self.num_columns - padding) for padding in self.padding]

    @property
    def buffer_lengths(self) -> list[int]:
        """Of these, how many are in the buffer."""
        return [n - body for n, body in zip(self.lengths, self.body_lengths, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Of everything stored, unused places of the buffer included."""
        return sum(body.num_bytes for body in self._body) + sum(t.numel() * t.element_size() for t in self._buffer)

    @property
    def body(self) -> tuple[Body, Body]:
        """Quantised keys and values."""
        return self._body

    @property
    def saved_bytes(self) -> int:
        """Bytes of the full-precision cache that a reader does not have to read now."""
        keys = self._buffer[0]
        sizes = (self.group_size, self.value_group_size)
        shape = (keys.shape[1], keys.shape[-1]) if self.is_initialized else (0, 0)
        return sum(saved_bytes(n, *shape, sizes, self.bits, keys.element_size()) for n in self.body_lengths)

    def room(self) -> list[int]:
        """Places left before the body grows, less the one of the next token."""
        return [2 * self.group_size - 1 - n for n in self.buffer_lengths]

    def align(self, shifts: list[int]) -> None:
        """The rows' newest tokens fall off: only lengths change, because rows are stored from their first token on."""
        self.padding = [padding + shift for padding, shift in zip(self.padding, shifts, strict=True)]
        self._check_body(-max(shifts))

    def flush(self) -> None:
        """Move from the buffer to the body what the rows' lengths say belongs there."""
        due: dict[tuple[int, int], list[int]] = {}
        for row, (n, body) in enumerate(zip(self.lengths, self.body_lengths, strict=True)):
            if more := body_length(n, self.group_size) - body:
                due.setdefault((body, more), []).append(row)
        if due:  # a reader may still hold a view of the old buffer: a prompt's first step reads after this
            self._buffer = (self._buffer[0].clone(), self._buffer[1].clone())
        for (start, number), rows in due.items():
            moved = tuple(buffer[rows, :, :number] for buffer in self._buffer)
            self._store(rows, start, moved[0], moved[1])
            for buffer in self._buffer:
                buffer[rows, :, :-number] = buffer[rows, :, number:]
        if due and self._buffer[0].shape[2] > 2 * self.group_size + SPARE:
            self._resize(2 * self.group_size + SPARE)

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, K, S, d], rows aligned on the right."""
        longest = max(self.body_lengths)
        if not longest and not any(self.padding):
            return tuple(buffer[:, :, : self.num_columns] for buffer in self._buffer)  # type: ignore[return-value]
        bodies = self._read_body() if longest else tuple(buffer[:, :, :0] for buffer in self._buffer)
        wholes = [torch.cat(pair, 2) for pair in zip(bodies, self._buffer, strict=True)]  # [B, K, body + places, d]
        if len(set(self.padding)) == 1 and not self.padding[0] and len(set(self.body_lengths)) == 1:
            return tuple(whole[:, :, : self.num_columns] for whole in wholes)  # type: ignore[return-value]
        device = wholes[0].device
        padding, body = (torch.tensor(one, device=device)[:, None] for one in (self.padding, self.body_lengths))
        token = torch.arange(self.num_columns, device=device) - padding  # [B, S], negative for padding
        place = torch.where(token < body, token, token - body + longest).clamp(min=0)[:, None, :, None]
        return tuple(w.gather(2, place.expand(-1, w.shape[1], -1, w.shape[3])) for w in wholes)  # type: ignore[return-value]

    def _read_body(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.bits in self._read:
            return self._read[self.bits]
        seen = (self._body[0].read(self.bits), self._body[1].read(self.bits))
        if self.is_remembering:
            self._read[self.bits] = seen
        return seen

    def _take_prompt(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.num_columns = key_states.shape[2]
        self._resize(2 * self.group_size + SPARE)
        for row, n in enumerate(self.lengths):
            body, start = body_length(n, self.group_size), self.num_columns - n
            one = slice(row, row + 1)
            if body:
                parts = (states[one, :, start : start + body] for states in (key_states, value_states))
                self._store([row], 0, *parts)
            for buffer, states in zip(self._buffer, (key_states, value_states), strict=True):
                buffer[one, :, : n - body] = states[one, :, start + body :]

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        old, number = self.num_columns, key_states.shape[2]
        self.num_columns += number
        self._resize(max(self._buffer[0].shape[2], *self.buffer_lengths, 0))
        places = [old - padding - body for padding, body in zip(self.padding, self.body_lengths, strict=True)]
        for buffer, states in zip(self._buffer, (key_states, value_states), strict=True):
            if len(set(places)) == 1 and places[0] >= 0:
                buffer[:, :, places[0] : places[0] + number] = states
                continue
            for row, place in enumerate(places):
                first = max(0, -place)  # of the new tokens, the first that is not padding
                buffer[row, :, place + first : place + number] = states[row, :, first:]

    def _store(self, rows: list[int], start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Quantise whole groups [rows, K, n, d] and put them behind the `start` tokens that these rows' bodies hold."""
        for body, states in zip(self._body, (keys, values), strict=True):
            body.put(rows, len(self.padding), start, states)
        for row in rows:
            self.body_lengths[row] = start + keys.shape[2]
        self._read = {}

    def _resize(self, num_places: int) -> None:
        """Give the buffer so many places."""
        self._buffer = tuple(resized(buffer, num_places) for buffer in self._buffer)  # type: ignore[assignment]

    def _check_body(self, taken: int) -> None:
        if min(self.buffer_lengths) < 0:
            raise ValueError(f"{-taken} tokens cannot be taken back: the oldest of them are in the quantised body")
