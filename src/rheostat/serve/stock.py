"""Rows on `transformers`, through the method's own touchpoints: a cache for each row, one row after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rheostat.adapted import Adapted
from rheostat.meter import Meter
from rheostat.serve.backend import Join, Row
from rheostat.spending import spend


@dataclass
class _Held:
    cache: Any
    num_tokens: int
    is_held: bool


class StockBackend:
    """See the module."""

    name = "stock"
    is_batched = False
    reads_pieces = False

    def __init__(self, adapted: Adapted) -> None:
        self.adapted, self.can_hold = adapted, adapted.can_hold
        self._rows: set[Row] = set()

    @torch.inference_mode()
    def join(self, joins: Sequence[Join]) -> None:
        """As `Backend.join`."""
        for one in joins:
            first = one.rows[0]
            adapted, ids = self.adapted, torch.tensor([first.prompt], device=self.adapted.device)
            cache = adapted.method.make_cache(adapted.model)
            with spend(one.compute, meter=first.meter, hold=one.is_held):
                logits = adapted.method.prefill(adapted.model, ids, torch.ones_like(ids), cache)
            for row in one.rows:
                own = cache if row is one.rows[-1] else self._copied(cache)
                row.state = _Held(own, len(first.prompt), one.is_held)
                self._show(row, logits)
        self._rows.update(row for one in joins for row in one.rows)

    def read(self, join: Join, start: int, stop: int) -> None:
        """As `Backend.read`: only ever the whole."""
        assert (start, stop) == (0, len(join.rows[0].prompt)), "a method reads its prompt in one go"
        self.join([join])

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], token_ids: Sequence[int], computes: Sequence[float]) -> None:
        """As `Backend.step`."""
        adapted = self.adapted
        for row, token, compute in zip(rows, token_ids, computes, strict=True):
            held: _Held = row.state
            held.num_tokens += 1
            ids = torch.tensor([[token]], device=adapted.device)
            mask = torch.ones(1, held.num_tokens, dtype=torch.long, device=adapted.device)
            with spend(compute, meter=row.meter, hold=held.is_held):
                self._show(row, adapted.method.decode(adapted.model, ids, mask, held.cache))

    def leave(self, row: Row) -> None:
        """As `Backend.leave`."""
        self._rows.discard(row)
        row.state = None

    @property
    def cache_bytes(self) -> int:
        """Not known in general."""
        return 0

    def _copied(self, cache: Any) -> Any:
        copied = copy.deepcopy(cache)
        self.adapted.share_account(cache, copied)
        return copied

    def _show(self, row: Row, logits: torch.Tensor) -> None:
        row.logits = logits[0].float().cpu()
        row.width = newest_width(row.meter)


def newest_width(meter: Meter) -> float:
    """FFN width of the last token of a meter's newest pass, as a fraction of the full width."""
    full = meter.num_layers * meter.ffn_size
    return int(meter.passes[-1].ffn_channels[0, -1]) / full if meter.passes and full else 1.0
