"""Rows of a batch that join and leave between steps, each with its own dial.

Two ways to run them: `native` on our own runtime, all rows in one step, and `stock` on `transformers`, row after row,
each with a cache of its own: slower, but right for any method. Both bill a row as if it ran alone, so that
what an answer cost does not depend on who else was there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rheostat.adapted import Adapted
from rheostat.meter import Meter
from rheostat.runtime.building import Unsupported
from rheostat.runtime.choosing import refuse

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Row:
    """One sequence that is being written."""

    prompt: list[int]
    meter: Meter
    """Of the request: its rows share it."""
    logits: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """[V] float32, for the next token."""
    width: float = 1.0
    """FFN width of the newest pass's last token, as a fraction."""
    layers: list[float] | None = None
    """The same by layer, where it is known."""
    state: Any = None
    """The backend's own."""


@dataclass(frozen=True)
class Join:
    """A request's rows, which share a prompt that is read once."""

    rows: Sequence[Row]
    compute: float
    """For the prompt."""
    is_held: bool = False
    """The rows are steered by what they have spent, each for itself."""


class Backend(Protocol):
    """What runs the rows. All calls come from one thread."""

    name: str
    is_batched: bool
    """Whether a step takes all rows at once; else they come one by one."""
    reads_pieces: bool
    """Whether a prompt can be read in pieces, with steps of other rows between them."""
    can_hold: bool
    """Whether rows can be held to what they asked for."""

    def join(self, joins: Sequence[Join]) -> None:
        """Read the prompts of new rows and set their logits. On an error none of them has joined."""

    def read(self, join: Join, start: int, stop: int) -> None:
        """Read tokens `start` to `stop` - 1 of one prompt, after all before them; at its end the rows join. Only one
        prompt is read so at a time. On an error the rows have not joined."""

    def step(self, rows: Sequence[Row], token_ids: Sequence[int], computes: Sequence[float]) -> None:
        """Read the newest token of each row and set its logits. After an error in a batch the rows are as before."""

    def leave(self, row: Row) -> None:
        """Free what a row holds and bill it to the end; also of one whose prompt was not read to its end."""

    @property
    def cache_bytes(self) -> int:
        """Bytes held for keys and values."""


def make_backend(adapted: Adapted, runtime: str = "auto", weights: str = "auto") -> Backend:
    """The fastest backend that can run this model.

    Raises:
        SettingError: `native` was asked for and cannot be had.
    """
    from rheostat.serve.native import NativeBackend

    native = adapted.runtime(runtime, weights)
    if native is None:
        return _stock(adapted, runtime)
    backend, row = NativeBackend(adapted, native), Row([1, 1], Meter(keep_passes=False))
    try:
        backend.join([Join([row], 1.0)])  # a method's own prefill may leave a cache that we cannot go on from
    except Unsupported as reason:
        refuse(runtime, reason)
        return _stock(adapted, runtime)
    backend.leave(row)
    return backend


def _stock(adapted: Adapted, runtime: str) -> Backend:
    from rheostat.serve.stock import StockBackend

    if runtime != "stock":  # it serves all the same, several times slower: nobody should have to find out by a clock
        logger.warning("transformers serves, row after row and slower: our runtime cannot run this model here")
    return StockBackend(adapted)
