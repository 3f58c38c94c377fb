"""A step of all rows that are being written: draw each one's token, then read those of the rows that go on."""

from __future__ import annotations

import logging

import torch

from rheostat.geometry import Geometry
from rheostat.sampling import most_likely, sample
from rheostat.serve.adaptive import lowered
from rheostat.serve.backend import Backend
from rheostat.serve.desk import Desk
from rheostat.serve.errors import failure, is_memory
from rheostat.serve.jobs import Job, Token, TokenProbability
from rheostat.serve.running import Line, Running

logger = logging.getLogger(__name__)


class Stepper:
    """See the module."""

    def __init__(self, desk: Desk, backend: Backend, end_ids: frozenset[int], low: float, geometry: Geometry) -> None:
        """
        Args:
            end_ids: tokens that end an answer.
            low: where the model's dial ends.
        """
        self.desk, self.backend, self.end_ids, self.low = desk, backend, end_ids, low
        self._weights = geometry.weights_of(1, 1)

    def step(self, level: float) -> None:
        """One token more for every row."""
        writing = self.desk.writing()
        for one in writing:
            try:
                self._draw(one)
            except Exception as error:
                self._fail(one, error)
        lines = [(one, line) for one in writing if self.desk.holds(one) for line in one.open_lines]
        if not lines:
            return
        for one, line in lines:
            asked = one.job.compute
            line.compute = lowered(asked, one.job.compute_min, level, self.low)
            one.note_compute(line.compute, asked, self._weights)
        self._read(lines)

    # -- draw

    def _draw(self, one: Running) -> None:
        job = one.job
        for line in one.open_lines:
            token = line.newest = self._choose(job, line)
            self.desk.note_token(one)
            if token in self.end_ids and not job.ignores_end:
                self.desk.end_line(one, line, "stop")
                continue
            self.desk.send(one, _token(job, line, token, line.writer.push(token)))
            if line.writer.is_stopped:
                self.desk.end_line(one, line, "stop")
            elif len(line.writer.token_ids) >= job.max_new_tokens:
                self.desk.end_line(one, line, "length")

    def _choose(self, job: Job, line: Line) -> int:
        best = int(most_likely(line.row.logits))  # of what is not a number, the first
        if not float(line.row.logits[best]) > float("-inf"):
            raise FloatingPointError("logits that are not numbers")
        if job.sampling.temperature == 0:
            return best
        return int(sample(line.row.logits[None], job.sampling, line.generator)[0])

    # -- read

    def _read(self, lines: list[tuple[Running, Line]]) -> None:
        rows = [line.row for _, line in lines]
        if self.backend.is_batched:
            try:
                self.backend.step(rows, [line.newest for _, line in lines], [line.compute for _, line in lines])
                return
            except Exception as error:
                logger.exception("a step of %d rows failed", len(rows))
                if is_memory(error):
                    self._read_fewer(lines, error)
                    return
        for one, line in lines:
            if self.desk.holds(one):
                self._read_alone(one, line)

    def _read_fewer(self, lines: list[tuple[Running, Line]], error: Exception) -> None:
        """Give up the job that came last, so that the others have room."""
        newest = lines[-1][0]
        self._fail(newest, error)
        if rest := [(one, line) for one, line in lines if one is not newest]:
            self._read(rest)

    def _read_alone(self, one: Running, line: Line) -> None:
        try:
            self.backend.step([line.row], [line.newest], [line.compute])
        except Exception as error:
            self._fail(one, error)

    def _fail(self, one: Running, error: Exception) -> None:
        logger.exception("request %s failed", one.job.id)
        self.desk.fail(one, *failure(error))


def _token(job: Job, line: Line, token: int, text: str) -> Token:
    logprob, top = None, ()
    if job.num_top is not None:
        logprob, top = _probabilities(line.row.logits, token, job.num_top)  # type: ignore[assignment]
    return Token(
        row=line.place,
        text=text,
        token_id=token,
        width=line.row.width,
        layers=line.row.layers,
        compute=line.compute,
        logprob=logprob,
        top=top,
    )


def _probabilities(logits: torch.Tensor, token: int, num_top: int) -> tuple[float, tuple[TokenProbability, ...]]:
    """Of the token that was drawn, and of the likeliest ones."""
    scores = logits.log_softmax(-1)
    if not num_top:
        return float(scores[token]), ()
    best = scores.topk(num_top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(scores[token]), tuple(TokenProbability(id, value) for id, value in pairs)
