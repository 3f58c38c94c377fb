"""Reading prompts: several short ones in one pass, or one piece of a long one, so that nobody who is being answered
waits for longer than a pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from rheostat.geometry import Geometry
from rheostat.serve.adaptive import lowered
from rheostat.serve.backend import Backend, Join, Row
from rheostat.serve.desk import Desk
from rheostat.serve.errors import failure
from rheostat.serve.running import Line, Running
from rheostat.serve.scheduler import Piece
from rheostat.serve.writing import Writer

logger = logging.getLogger(__name__)


class Reader:
    """See the module."""

    def __init__(self, desk: Desk, backend: Backend, tokenizer: Any, low: float, geometry: Geometry) -> None:
        """
        Args:
            tokenizer: nobody else uses it.
            low: where the model's dial ends.
        """
        self.desk, self.backend, self.low, self.geometry = desk, backend, low, geometry
        self._tokenizer = tokenizer

    def read(self, reads: Sequence[tuple[Running, Piece]], level: float) -> None:
        """Read pieces of prompts; those that are whole then have their first logits. What fails, fails alone."""
        if not reads:
            return
        if len(reads) == 1 and not reads[0][1].is_whole:
            self._read_piece(*reads[0], level)
            return
        ones = [one for one, _ in reads]
        joins = [self._prepare(one, level) for one in ones]
        try:
            self.backend.join(joins)
        except Exception:
            for each in joins:
                self._take_back(each)
            self._read_alone(ones, joins)
            return
        for one in ones:
            one.read = time.monotonic()

    def _read_alone(self, ones: list[Running], joins: list[Join]) -> None:
        """Find out whose prompt it was: the others go on."""
        for one, join in zip(ones, joins, strict=True):
            try:
                self.backend.join([join])
                one.read = time.monotonic()
            except Exception as error:
                self._fail(one, join, error)

    def _read_piece(self, one: Running, piece: Piece, level: float) -> None:
        join = self._prepare(one, level) if piece.start == 0 else _join_of(one)
        try:
            self.backend.read(join, piece.start, piece.stop)
        except Exception as error:
            self._fail(one, join, error)
            return
        if piece.is_last:
            one.read = time.monotonic()

    def _fail(self, one: Running, join: Join, error: Exception) -> None:
        logger.exception("request %s failed at its prompt", one.job.id)
        self._take_back(join)
        self.desk.fail(one, *failure(error))

    def _take_back(self, join: Join) -> None:
        for row in join.rows:
            self.backend.leave(row)

    def _prepare(self, one: Running, level: float) -> Join:
        job = one.job
        one.joined = time.monotonic()
        compute = lowered(job.prefill_compute, job.compute_min, level, self.low)
        one.note_compute(compute, job.prefill_compute, self.geometry.weights_of(len(job.prompt), 1))
        one.is_held = job.is_held and self.backend.can_hold
        for place in range(job.n):
            row = Row(job.prompt, one.meter)
            generator = torch.Generator().manual_seed((job.seed + place) % 2**63)
            one.lines.append(Line(row, place, Writer(self._decode, job.stops), generator, compute=compute))
        return _join_of(one)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _join_of(one: Running) -> Join:
    return Join([line.row for line in one.lines], one.lines[0].compute, one.is_held)
