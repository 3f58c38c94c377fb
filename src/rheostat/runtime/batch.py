"""`Batch`: prompts being read and answers being written, on one `Runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rheostat.holding import Account
from rheostat.meter import Meter
from rheostat.runtime import plain
from rheostat.runtime.ahead import Pieces, read_ahead
from rheostat.runtime.billing import Tally
from rheostat.runtime.building import Unsupported
from rheostat.runtime.cache import KVCache
from rheostat.runtime.engine import Runtime, Settings
from rheostat.runtime.planes import PlaneCache
from rheostat.runtime.prefill import Prompt, prefill, prefill_held, set_lengths
from rheostat.spending import current_spending

AHEAD = 512
"""Tokens to write that a cache has room for at first, where more may come."""


class Batch:
    """Prompts that were read, and their answers as far as they are written."""

    def __init__(self, runtime: Runtime, cache: KVCache, positions: torch.Tensor, logits: torch.Tensor) -> None:
        self.runtime, self.cache = runtime, cache
        self.positions = positions
        """[B] int64, of the next token."""
        self.logits = logits
        """[B, V] float32, for the next token."""
        self._tally = Tally()
        self._room = torch.empty(0, 0)
        self._account: Account | None = None
        self._open: tuple[Meter, torch.Tensor, list[torch.Tensor | None]] | None = None

    @classmethod
    def read(
        cls,
        runtime: Runtime,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        settings: Settings,
        *,
        num_new: int = 0,
        account: Account | None = None,
    ) -> Batch:
        """Read prompts [B, T]; padding, where the mask is 0, is left out. Bills the enclosing `spend`.

        Args:
            num_new: tokens that will be written, to have room for.
            account: holds the rows to what the enclosing `spend` asks for, here and in each step.
        """
        prompt = Prompt.of(input_ids, attention_mask)
        cache = runtime.new_cache(len(input_ids), max(prompt.lengths) + min(num_new, AHEAD))
        logits = torch.empty(len(input_ids), runtime.weights.vocab_size)
        batch = cls(runtime, cache, torch.tensor(prompt.lengths), logits)
        batch._account = account
        for depth, rows in runtime.depths(settings, len(input_ids)).items():
            mask = prompt.valid[rows]
            one = prompt if len(rows) == len(input_ids) else Prompt.of(input_ids[rows], mask, rows=rows)
            setting = runtime.setting({key: value[rows] for key, value in settings.items()})
            logits[rows] = batch._read(one, depth, setting)
        batch._take_form(num_new)
        return batch

    def _read(self, prompt: Prompt, depth: int | None, setting: torch.Tensor | None) -> torch.Tensor:
        """Rows that are read alike; bills them, and returns the next token's logits [b, V]."""
        runtime, spending = self.runtime, current_spending()
        ahead = runtime.ahead
        if ahead is None or depth is None or prompt.valid.shape[1] <= ahead.num_exact:
            if self._account is not None and spending is not None:
                asked = spending.rows("prefill", len(prompt.lengths))
                hidden, experts = prefill_held(
                    runtime.prefill_weights, prompt, self.cache, self._account, asked, runtime.rope
                )
            else:
                hidden, experts = prefill(runtime.prefill_weights, prompt, self.cache, setting, runtime.rope)
            if spending is not None:
                runtime.biller.prefill(spending.meter, self._tally, prompt.valid, prompt.lengths, experts)
            return plain.product(runtime.prefill_weights.head, hidden).float()
        pieces = Pieces.of(prompt, ahead.num_exact)
        maps, weights = runtime.maps(depth), runtime.prefill_weights
        h, below = read_ahead(weights, maps, prompt, pieces, self.cache, setting, runtime.rope)
        set_lengths(self.cache, pieces.early)
        logits, above = runtime.finish(depth, h, pieces.late, self.cache, setting)
        if spending is not None:
            early, late = pieces.split(below)
            runtime.biller.ahead(spending.meter, self._tally, pieces.early, maps, early)
            chosen = None if setting is None else [*(late or ()), *(above or ())]
            one = pieces.late
            runtime.biller.prefill(spending.meter, self._tally, one.valid, one.lengths, chosen, one.pasts)
        return logits

    @classmethod
    def resume(
        cls,
        runtime: Runtime,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor,
        logits: torch.Tensor,
        *,
        num_new: int = 0,
    ) -> Batch:
        """Go on from keys and values [B, K, S, d] of each layer that somebody else filled, left-padded as the mask
        [B, S] says, and the next token's logits [B, V]."""
        lengths = attention_mask.long().sum(1)
        num_slots = attention_mask.shape[1]
        cache = runtime.new_cache(len(logits), num_slots + min(num_new, AHEAD))
        cache.fill(pairs, num_slots - lengths)
        batch = cls(runtime, cache, lengths, logits.float())
        batch._take_form(num_new)
        return batch

    def _take_form(self, num_new: int) -> None:
        """Put what was read into the cache that the runtime has to keep."""
        if (form := self.runtime.cache_form) is not None:
            room = int(self.positions.max()) + min(num_new, AHEAD)
            self.cache = PlaneCache.of(self.cache, form.group_size, form.value_group_size, room)

    def step(self, token_ids: torch.Tensor, settings: torch.Tensor | None) -> torch.Tensor:
        """Read the newest token [B] of each row at the native settings [B]; returns the next one's logits [B, V].
        Rows that are held have settings of their own.

        What it cost is billed by `settle`, at the latest.
        """
        spending = current_spending()
        meter = None if spending is None else spending.meter
        if meter is not None and (self._open is None or self._open[0] is not meter):
            self.settle()
            self._open = (meter, self.positions.clone(), [])
        if self._open is not None and self.cache.body is not None:
            self._bill_body(spending.meter if spending is not None else None)
        held = None
        if self._account is not None and spending is not None:
            held = self._account.step(spending.rows("decode", len(token_ids)))
            settings = torch.tensor(held.values)
        self.logits, experts = self.runtime.step(token_ids, self.positions, self.cache, settings)
        if held is not None:
            held.close([0] * len(token_ids) if experts is None else self.runtime.saved(experts))
        self.cache.settle()
        self.positions += 1
        if self._open is not None and meter is not None:
            self._open[2].append(experts)
        return self.logits

    def check(
        self, token_ids: torch.Tensor, settings: torch.Tensor | None, counts: Sequence[int], *, is_draft: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read several tokens [N] a row, `counts` [B] of them, which may be taken back: nothing moves to a body yet.

        Bills nothing: whoever checks knows what for.

        Returns:
            Logits [N, V], valid until the next call, and the experts [L, N] that were taken, if any were chosen.
        """
        positions, given, asked = self.positions, settings, None
        if any(count != 1 for count in counts):  # a draft's own steps, one token a row, are spared this
            asked, firsts = counts, self.positions.tolist()
            positions = torch.tensor([n + i for n, count in zip(firsts, counts, strict=True) for i in range(count)])
            given = None if settings is None else settings.repeat_interleave(torch.tensor(counts))
        out = self._logits_of(len(token_ids))
        logits, experts = self.runtime.step(token_ids, positions, self.cache, given, asked, is_draft=is_draft, out=out)
        self.positions += 1 if asked is None else torch.tensor(counts)
        return logits, experts

    def write(
        self,
        token_ids: torch.Tensor,
        counts: Sequence[int],
        settings: torch.Tensor | None,
        number: int,
        *,
        is_draft: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read the newest tokens [N] of some rows, 1 of `counts` [B] (of the others 0), and write `number` more,
        greedily, of which the last is not read. Bills nothing, as `check` does.

        Returns:
            The tokens [n, N], and the experts [n, L, N] that were taken, if any were chosen.
        """
        positions, given = self.positions, settings
        if not all(counts):
            active = torch.tensor(counts).bool()
            positions, given = positions[active], None if given is None else given[active]
        found = self.runtime.write(
            token_ids,
            positions,
            self.cache,
            given,
            counts,
            number,
            is_draft=is_draft,
            out=self._logits_of(len(token_ids)),
        )
        self.positions += torch.tensor([number * count for count in counts])
        return found

    def _logits_of(self, number: int) -> torch.Tensor:
        """Memory for logits [N, V], kept: fresh memory of this size costs milliseconds on some machines."""
        if len(self._room) < number:
            self._room = torch.empty(number, self.runtime.weights.vocab_size)
        return self._room[:number]

    def take_back(self, numbers: Sequence[int]) -> None:
        """Forget the newest tokens of each row, [B] of them."""
        if any(numbers):
            self.cache.truncate([n - less for n, less in zip(self.cache.lengths.tolist(), numbers, strict=True)])
            self.positions -= torch.tensor(numbers)

    @property
    def tally(self) -> Tally:
        """What the meter holds of this batch."""
        return self._tally

    def _bill_body(self, meter: Meter | None) -> None:
        if meter is not None:
            meter.add("scores", 0, -self.runtime.body_savings(self.cache, 8), 0, 0)

    def settle(self) -> None:
        """Bill the steps that were not billed yet."""
        if self._open is None:
            return
        (meter, pasts, chosen), self._open = self._open, None
        start = 0
        while start < len(chosen):  # runs of steps alike: with a router asked, or without
            stop = start + 1
            while stop < len(chosen) and (chosen[stop] is None) == (chosen[start] is None):
                stop += 1
            run = [one for one in chosen[start:stop] if one is not None]
            experts = torch.stack(run) if run else None
            self.runtime.biller.steps(meter, self._tally, pasts + start, experts, stop - start)
            start = stop


def keys_and_values(cache: Any, num_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [B, K, S, d] of every layer of a cache of `transformers` that holds `num_tokens` tokens a row.

    Raises:
        Unsupported: it holds something else.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    pairs = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise Unsupported(f"a cache with layers of the kind {type(layer).__name__}")
        if layer.keys.shape[2] != num_tokens:
            raise Unsupported("a cache that dropped some of the prompt")
        pairs.append((layer.keys, layer.values))
    return pairs
