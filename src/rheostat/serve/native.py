"""Rows on our own runtime: one cache with a place for each row, all rows in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rheostat.adapted import Adapted
from rheostat.runtime import plain
from rheostat.runtime.billing import Tally
from rheostat.runtime.cache import SMALLEST, KVCache
from rheostat.runtime.engine import Runtime, keys_and_values
from rheostat.runtime.prefill import Prompt, prefill
from rheostat.serve.backend import Join, Row
from rheostat.serve.stock import newest_width
from rheostat.spending import spend

BILL_EVERY = 64
"""Steps after which a row is billed: a bound on what waits, large enough that billing costs nothing."""

Chosen = list[torch.Tensor | None]


@dataclass
class _Held:
    """What a row has in the batch."""

    tally: Tally
    billed: int
    """Tokens of the row that were billed."""
    unbilled: Chosen = field(default_factory=list)
    """The expert [L] that each layer took, of each step since."""


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
            self._grow(self._keys.shape[1], max(num_slots, 2 * self.num_slots))

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A new row at the end, with keys and values [L, K, S, d]."""
        count, length = len(self.lengths), keys.shape[2]
        if count == self._keys.shape[1]:
            self._grow(2 * count, self.num_slots)
        self.reserve(length)
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
            self._keys, self._values = (one.new_zeros(*one.shape[:1], 1, one.shape[2], SMALLEST, one.shape[4])
                                        for one in (self._keys, self._values))  # fmt: skip
        self._show(last)

    def only(self, row: int) -> KVCache:
        """One row by itself, on the same memory as long as it need not grow."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        view.lengths, view.starts = self.lengths[row : row + 1], self.starts[row : row + 1]
        return view

    def _show(self, count: int) -> None:
        self.keys, self.values = self._keys[:, :count], self._values[:, :count]
        self.lengths = self.lengths[:count]
        self.starts = torch.zeros(count, dtype=torch.int32)

    def _grow(self, num_rows: int, num_slots: int) -> None:
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_zeros(old.shape[0], num_rows, old.shape[2], num_slots, old.shape[4])
            new[:, : old.shape[1], :, : old.shape[3]] = old
            setattr(self, name, new)
        self._show(len(self.lengths))


class NativeBackend:
    """See the module."""

    is_batched = True

    def __init__(self, adapted: Adapted, runtime: Runtime) -> None:
        self.adapted, self.runtime = adapted, runtime
        self.name = f"native {runtime.format}"
        self.cache = RowCache(runtime)
        self._rows: list[Row] = []
        """In the order of the cache."""
        self._prefills_itself = "prefill" not in adapted.method.acts_at()

    @property
    def cache_bytes(self) -> int:
        """Bytes held for keys and values."""
        return self.cache.allocated

    # -- join

    @torch.inference_mode()
    def join(self, joins: Sequence[Join]) -> None:
        """As `Backend.join`: all prompts in one pass, or one by one where the method reads them."""
        if self._prefills_itself:
            self._read(joins)
            return
        for one in joins:
            self._read_by_method(one)

    def _read(self, joins: Sequence[Join]) -> None:
        runtime = self.runtime
        prompts = [one.rows[0].prompt for one in joins]
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        valid = torch.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, : len(prompt)] = torch.tensor(prompt)
            valid[place, : len(prompt)] = 1
        fresh = runtime.new_cache(len(prompts), max(lengths))
        settings = torch.tensor([self._native(one.compute) for one in joins])
        hidden, experts = prefill(
            runtime.prefill_weights, Prompt.of(ids, valid), fresh, settings if bool((settings > 0).any()) else None,
            runtime.rope,
        )  # fmt: skip
        logits = plain.product(runtime.weights.head, hidden).float()  # [B, V]
        parts = None if experts is None else [one.split(lengths) for one in experts]
        for place, one in enumerate(joins):
            tally, meter, length = Tally(), one.rows[0].meter, lengths[place]
            own = None if parts is None or settings[place] <= 0 else [part[place] for part in parts]
            mask = torch.ones(1, length, dtype=torch.bool)
            runtime.biller.prefill(meter, tally, mask, [length], own)
            last = None if own is None else torch.stack([part[-1] for part in own])
            for row in one.rows:
                self.cache.append(fresh.keys[:, place, :, :length], fresh.values[:, place, :, :length])
                self._add(row, tally, length, logits[place])
                self._show_widths(row, None if last is None else self._all_layers(last))

    def _read_by_method(self, one: Join) -> None:
        """A prompt that a method reads its own way; we go on from its cache."""
        adapted, first = self.adapted, one.rows[0]
        ids = torch.tensor([first.prompt])
        cache = adapted.method.make_cache(adapted.model)
        with spend(one.compute, meter=first.meter):
            logits = adapted.method.prefill(adapted.model, ids, torch.ones_like(ids), cache).float()
        pairs = keys_and_values(cache, len(first.prompt))
        keys, values = (torch.stack([pair[k][0] for pair in pairs]) for k in (0, 1))  # [L, K, S, d]
        tally = Tally()
        for row in one.rows:
            self.cache.append(keys, values)
            self._add(row, tally, len(first.prompt), logits[0])
            row.width, row.layers = newest_width(row.meter), None

    def _add(self, row: Row, tally: Tally, length: int, logits: torch.Tensor) -> None:
        row.state, row.logits = _Held(tally, length), logits
        self._rows.append(row)

    # -- step and leave

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], token_ids: Sequence[int], computes: Sequence[float]) -> None:
        """As `Backend.step`: `rows` are all that joined and did not leave, or one of them."""
        runtime, order = self.runtime, [self._rows.index(row) for row in rows]
        settings = torch.tensor([self._native(compute) for compute in computes])
        ids = torch.tensor(list(token_ids))
        if len(rows) == len(self._rows):
            cache: KVCache = self.cache
            back = torch.tensor(order).argsort()
            ids, settings = ids[back], settings[back]
        else:
            assert len(rows) == 1, "all rows or one"
            self.cache.reserve(int(self.cache.lengths[order[0]]) + 1)
            cache = self.cache.only(order[0])
        given = settings if bool((settings > 0).any()) else None
        positions = cache.lengths.long()
        logits, experts = runtime.step(ids, positions, cache, given)
        for place, row in enumerate(self._rows if cache is self.cache else rows):
            row.logits = logits[place]
            chosen = None if experts is None or settings[place] <= 0 else experts[:, place].clone()
            row.state.unbilled.append(chosen)
            self._show_widths(row, chosen)
            if len(row.state.unbilled) >= BILL_EVERY:
                self._settle(row)

    def leave(self, row: Row) -> None:
        """As `Backend.leave`."""
        if row not in self._rows:
            return
        try:
            self._settle(row)
        finally:
            place = self._rows.index(row)
            self.cache.drop(place)
            last = self._rows.pop()
            if last is not row:
                self._rows[place] = last
            row.state = None

    def _settle(self, row: Row) -> None:
        """Bill the steps of a row that were not billed: runs of steps alike, as `Batch.settle` does."""
        held: _Held = row.state
        chosen, held.unbilled = held.unbilled, []
        start = 0
        while start < len(chosen):
            stop = start + 1
            while stop < len(chosen) and (chosen[stop] is None) == (chosen[start] is None):
                stop += 1
            run = [one for one in chosen[start:stop] if one is not None]
            experts = torch.stack(run)[:, :, None] if run else None  # [n, L, 1]
            pasts = torch.tensor([held.billed])
            self.runtime.biller.steps(row.meter, held.tally, pasts, experts, stop - start)
            held.billed += stop - start
            start = stop

    # -- widths

    def _native(self, compute: float) -> float:
        """The setting that the routers obey; 0 is the full FFN."""
        key = self.runtime.key
        return 0.0 if key is None else self.adapted.dial.native(compute).get(key, 0.0)

    def _all_layers(self, experts: torch.Tensor) -> torch.Tensor:
        """Experts [R] of the routed layers as experts [L] of all."""
        biller = self.runtime.biller
        out = torch.zeros(len(self.runtime.weights.layers), dtype=torch.long)
        out[biller.routed] = experts
        return out

    def _show_widths(self, row: Row, chosen: torch.Tensor | None) -> None:
        """Note how wide the newest token's FFN was, from the expert [L] of each layer."""
        layers = self.runtime.weights.layers
        if chosen is None:
            row.width, row.layers = 1.0, [1.0] * len(layers)
            return
        taken = chosen.tolist()
        shares = [layer.ffn.sizes[one] / layer.ffn.sizes[-1] if layer.ffn.router is not None else 1.0
                  for layer, one in zip(layers, taken, strict=True)]  # fmt: skip
        row.layers, row.width = shares, sum(shares) / len(shares)
