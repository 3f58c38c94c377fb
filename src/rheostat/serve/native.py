"""Rows on our own runtime: one cache with a place for each row, all rows in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from rheostat.adapted import Adapted
from rheostat.holding import Account, Past
from rheostat.runtime import plain
from rheostat.runtime.batch import Batch, keys_and_values
from rheostat.runtime.billing import Tally
from rheostat.runtime.cache import KVCache
from rheostat.runtime.engine import Runtime
from rheostat.runtime.prefill import Prompt, prefill, prefill_held
from rheostat.serve.backend import Join, Row
from rheostat.serve.row_cache import RowCache
from rheostat.serve.stock import newest_width
from rheostat.spending import spend

BILL_EVERY = 64
"""Steps after which a row is billed: a bound on what waits, large enough that billing costs nothing."""

Chosen = list[torch.Tensor | None]


@dataclass
class _Reading:
    """A prompt that is read in pieces."""

    join: Join
    cache: KVCache
    """Its own, until it joins."""
    past: Past | None
    """What holds it, if anything does."""
    experts: list[list[torch.Tensor]] = field(default_factory=list)
    """Of each piece: the experts [T] of each routed layer; empty where all took the full FFN."""
    num_read: int = 0


@dataclass
class _Held:
    """What a row has in the batch."""

    tally: Tally
    billed: int
    """Tokens of the row that were billed."""
    past: Past | None
    """What holds it to what it asked for, if anything does."""
    unbilled: Chosen = field(default_factory=list)
    """The expert [L] that each layer took, of each step since."""


class NativeBackend:
    """See the module."""

    is_batched = True

    def __init__(self, adapted: Adapted, runtime: Runtime) -> None:
        self.adapted, self.runtime = adapted, runtime
        self.name = f"native {runtime.format}"
        self.cache = RowCache(runtime)
        self._rows: list[Row] = []
        """In the order of the cache."""
        self._reading: _Reading | None = None
        self.reads_pieces = "prefill" not in adapted.method.acts_at()
        self.can_hold = adapted.can_hold and self.reads_pieces

    @property
    def cache_bytes(self) -> int:
        """Bytes held for keys and values."""
        return self.cache.allocated

    # -- join

    @torch.inference_mode()
    def join(self, joins: Sequence[Join]) -> None:
        """As `Backend.join`: all prompts in one pass, or one by one where the method reads them."""
        if not self.reads_pieces:
            for one in joins:
                self._read_by_method(one)
            return
        prompts = [one.rows[0].prompt for one in joins]
        lengths = [len(prompt) for prompt in prompts]
        fresh, pasts = self.runtime.new_cache(len(prompts), max(lengths)), [self._new_past(one) for one in joins]
        logits, experts = self._pass(prompts, fresh, [one.compute for one in joins], pasts)
        parts = None if experts is None else [one.split(lengths) for one in experts]
        for place, one in enumerate(joins):
            own = None if parts is None or not self._native(one.compute) else [part[place] for part in parts]
            keys, values = (held[:, place, :, : lengths[place]] for held in (fresh.keys, fresh.values))
            self._seat(one, keys, values, logits[place], own, pasts[place])

    @torch.inference_mode()
    def read(self, join: Join, start: int, stop: int) -> None:
        """As `Backend.read`."""
        if not self.reads_pieces:
            assert (start, stop) == (0, len(join.rows[0].prompt)), "a method reads its prompt in one go"
            self._read_by_method(join)
            return
        prompt = join.rows[0].prompt
        if start == 0:
            self._reading = _Reading(join, self.runtime.new_cache(1, len(prompt)), self._new_past(join))
        held = self._reading
        assert held is not None, "from its start"
        assert (held.join.rows[0], held.num_read) == (join.rows[0], start), "one prompt at a time"
        piece = prompt[start:stop]
        logits, experts = self._pass([piece], held.cache, [join.compute], [held.past], [start], stop == len(prompt))
        held.experts.append(experts or [])
        held.num_read = stop
        if stop == len(prompt):
            keys, values = held.cache.keys[:, 0, :, :stop], held.cache.values[:, 0, :, :stop]
            self._reading = None
            self._seat(join, keys, values, logits[0], _joined(held.experts), held.past)

    def _pass(
        self,
        parts: Sequence[Sequence[int]],
        cache: KVCache,
        computes: Sequence[float],
        held: Sequence[Past | None],
        pasts: Sequence[int] | None = None,
        is_last: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Read token ids into the rows of a cache, after the `pasts` tokens that each holds. Returns the next ones'
        logits [B, V] float32, which are wanted where the prompts end here, and the experts [N] of each routed layer."""
        runtime = self.runtime
        ids = torch.zeros(len(parts), max(map(len, parts)), dtype=torch.long)
        valid = torch.zeros_like(ids)
        for place, part in enumerate(parts):
            ids[place, : len(part)] = torch.tensor(part)
            valid[place, : len(part)] = 1
        prompt, weights = Prompt.of(ids, valid, pasts=pasts), runtime.prefill_weights
        if (account := self._account(held)) is not None:
            hidden, experts = prefill_held(weights, prompt, cache, account, computes, runtime.rope, is_last=is_last)
        else:
            settings = torch.tensor([self._native(compute) for compute in computes])
            given = settings if bool((settings > 0).any()) else None
            hidden, experts = prefill(weights, prompt, cache, given, runtime.rope)
        return plain.product(runtime.prefill_weights.head, hidden).float(), experts

    def _seat(
        self,
        join: Join,
        keys: torch.Tensor,
        values: torch.Tensor,
        logits: torch.Tensor,
        experts: list[torch.Tensor] | None,
        past: Past | None,
    ) -> None:
        """A prompt is read, into keys and values [L, K, S, d]: its rows join, and it is billed as one pass."""
        tally, length = Tally(), keys.shape[2]
        for row in join.rows:
            self.cache.append(keys, values)
            self._add(row, tally, length, logits, None if past is None else replace(past))
        self._bill_prompt(join, tally, length, experts)
        last = None if experts is None else torch.stack([one[-1] for one in experts])
        for row in join.rows:
            self._show_widths(row, None if last is None else self._all_layers(last))

    def _bill_prompt(self, join: Join, tally: Tally, length: int, experts: list[torch.Tensor] | None) -> None:
        mask = torch.ones(1, length, dtype=torch.bool)
        self.runtime.biller.prefill(join.rows[0].meter, tally, mask, [length], experts)

    def _read_by_method(self, one: Join) -> None:
        """A prompt that a method reads its own way, on our runtime or by itself; we go on from its cache."""
        adapted, first = self.adapted, one.rows[0]
        ids = torch.tensor([first.prompt])
        with spend(one.compute, meter=first.meter):
            if adapted.reads_prompts_on(self.runtime):
                batch = Batch.read(self.runtime, ids, None, adapted.settings("prefill", 1))
                logits, length = batch.logits, ids.shape[1]
                keys, values = (held[:, 0, :, :length] for held in (batch.cache.keys, batch.cache.values))
            else:
                cache = adapted.method.make_cache(adapted.model)
                logits = adapted.method.prefill(adapted.model, ids, torch.ones_like(ids), cache).float()
                pairs = keys_and_values(cache, len(first.prompt))
                keys, values = (torch.stack([pair[k][0] for pair in pairs]) for k in (0, 1))  # [L, K, S, d]
        tally = Tally()
        for row in one.rows:
            self.cache.append(keys, values)
            self._add(row, tally, len(first.prompt), logits[0], None)
            row.width, row.layers = newest_width(row.meter), None

    def _add(self, row: Row, tally: Tally, length: int, logits: torch.Tensor, past: Past | None) -> None:
        row.state, row.logits = _Held(tally, length, past), logits
        self._rows.append(row)

    # -- step and leave

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], token_ids: Sequence[int], computes: Sequence[float]) -> None:
        """As `Backend.step`: `rows` are all that joined and did not leave, or one of them."""
        runtime, cache = self.runtime, self._cache_of(rows)
        news = dict(zip(rows, zip(token_ids, computes, strict=True), strict=True))
        ordered = self._rows if cache is self.cache else list(rows)
        ids, asked = torch.tensor([news[row][0] for row in ordered]), [news[row][1] for row in ordered]
        account = self._account([row.state.past for row in ordered])
        step = None if account is None else account.step(asked)
        native = [self._native(compute) for compute in asked] if step is None else step.values
        given = torch.tensor(native) if max(native) > 0 else None
        logits, experts = runtime.step(ids, cache.lengths.long(), cache, given)
        if step is not None:
            step.close([0] * len(ordered) if experts is None else runtime.saved(experts))
        for place, row in enumerate(ordered):
            row.logits = logits[place]
            chosen = None if experts is None or native[place] <= 0 else experts[:, place].clone()
            row.state.unbilled.append(chosen)
            self._show_widths(row, chosen)
            if len(row.state.unbilled) >= BILL_EVERY:
                self._settle(row)

    def _cache_of(self, rows: Sequence[Row]) -> KVCache:
        """All rows' cache; or that of one alone."""
        if len(rows) == len(self._rows):
            return self.cache
        assert len(rows) == 1, "all rows or one"
        place = self._rows.index(rows[0])
        self.cache.reserve(int(self.cache.lengths[place]) + 1)
        return self.cache.only(place)

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """As `Backend.leave`."""
        if (held := self._reading) is not None and row in held.join.rows:
            self._reading = None
            if held.num_read:
                self._bill_prompt(held.join, Tally(), held.num_read, _joined(held.experts))
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

    # -- the dial

    def _new_past(self, join: Join) -> Past | None:
        return Past() if join.is_held and self.can_hold else None

    def _account(self, pasts: Sequence[Past | None]) -> Account | None:
        """Of rows in their order; None where none is held."""
        return Account(self.adapted.table, pasts) if any(past is not None for past in pasts) else None

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


def _joined(pieces: list[list[torch.Tensor]]) -> list[torch.Tensor] | None:
    """Experts of the pieces of a prompt as experts [T] of each routed layer; None where no router was asked."""
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)] or None
