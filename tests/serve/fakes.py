"""A backend without a model: what rows were told, and logits by a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rheostat.serve.adaptive import Adaptive
from rheostat.serve.backend import Join, Row
from rheostat.serve.desk import Desk, Watcher
from rheostat.serve.jobs import Event, Job
from rheostat.serve.running import Running
from rheostat.serve.scheduler import Limits, Scheduler

VOCABULARY = 16


def likes(token: int) -> torch.Tensor:
    """Logits [V] that greedy decoding turns into this token."""
    logits = torch.zeros(VOCABULARY)
    logits[token] = 1
    return logits


class FakeBackend:
    """Writes one more than it read; `breaks` may say no."""

    name = "fake"
    is_batched = True
    reads_pieces = True
    can_hold = True
    cache_bytes = 0

    def __init__(self, breaks: Callable[[Sequence[Row]], Exception | None] = lambda rows: None) -> None:
        self.breaks = breaks
        self.calls: list[tuple[Any, ...]] = []
        self.held: set[Row] = set()

    def join(self, joins: Sequence[Join]) -> None:
        rows = [row for one in joins for row in one.rows]
        self.calls.append(("join", [one.compute for one in joins]))
        self._check(rows)
        for row in rows:
            row.logits = likes(row.prompt[-1])
            self.held.add(row)

    def read(self, join: Join, start: int, stop: int) -> None:
        self.calls.append(("read", start, stop))
        self._check(join.rows)
        if stop == len(join.rows[0].prompt):
            for row in join.rows:
                row.logits = likes(row.prompt[-1])
                self.held.add(row)

    def step(self, rows: Sequence[Row], token_ids: Sequence[int], computes: Sequence[float]) -> None:
        self.calls.append(("step", list(token_ids), list(computes)))
        self._check(rows)
        for row, token in zip(rows, token_ids, strict=True):
            row.logits = likes((token + 1) % VOCABULARY)

    def leave(self, row: Row) -> None:
        self.held.discard(row)

    def _check(self, rows: Sequence[Row]) -> None:
        if error := self.breaks(rows):
            raise error


class Letters:
    """A tokenizer: token 3 is `d`."""

    @staticmethod
    def decode(ids: Sequence[int], **settings: Any) -> str:
        return "".join(chr(97 + id) for id in ids)


def desk(backend: FakeBackend, adaptive: Adaptive | None = None, watcher: Watcher | None = None, **limits: Any) -> Desk:
    """A desk for it."""
    return Desk(backend, Scheduler(Limits(**limits)), adaptive, watcher)


def submit(place: Desk, id: str, prompt: Sequence[int] = (1, 2), new: int = 4, **settings: Any) -> list[Event]:
    """Put a job in; returns what it will be told."""
    events: list[Event] = []
    place.submit(Job(id=id, prompt=list(prompt), max_new_tokens=new, **settings), events.append)
    return events


def running(place: Desk, id: str) -> Running:
    """What the desk knows of it."""
    return place._jobs[id]
