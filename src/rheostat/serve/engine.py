"""Continuous batching: one thread that runs the model, and requests that join and leave between its steps.

Other threads only `submit`, `cancel`, `drain` and `stop`; all state of a running job belongs to the worker.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rheostat.adapted import Adapted
from rheostat.meter import Meter
from rheostat.sampling import sample
from rheostat.serve.adaptive import Adaptive, lowered
from rheostat.serve.backend import Backend, Join, Row
from rheostat.serve.jobs import Bill, Done, Event, Failed, Job, RowDone, Sink, Token, TokenProbability
from rheostat.serve.scheduler import Scheduler, Ticket
from rheostat.serve.writing import Writer

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Told of what happens, in the worker's thread; for metrics."""

    def finished(self, reason: str, bill: Bill) -> None: ...

    def token(self, seconds: float | None) -> None: ...


@dataclass(eq=False)
class _Line:
    """One row of a job."""

    row: Row
    place: int
    writer: Writer
    generator: torch.Generator
    is_done: bool = False
    newest: int = 0
    compute: float = 1.0
    """Of the pass whose logits are at hand."""


@dataclass(eq=False)
class _Running:
    """A job and what the worker knows of it."""

    job: Job
    sink: Sink
    arrived: float
    meter: Meter = field(default_factory=lambda: Meter(keep_passes=False))
    lines: list[_Line] = field(default_factory=list)
    joined: float = 0.0
    read: float = 0.0
    first: float = 0.0
    newest: float = 0.0
    lowest: float = 1.0
    is_lowered: bool = False


class Engine:
    """See the module."""

    def __init__(
        self,
        adapted: Adapted,
        tokenizer: Any,
        backend: Backend,
        scheduler: Scheduler | None = None,
        *,
        adaptive: Adaptive | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.adapted, self.backend = adapted, backend
        self.scheduler = scheduler or Scheduler()
        self.adaptive, self.watcher = adaptive, watcher
        self.end_ids = end_ids(adapted, tokenizer)
        self._tokenizer = copy.deepcopy(tokenizer)  # the worker's own: the other one is encoding meanwhile
        self._jobs: dict[str, _Running] = {}
        self._cancelled: set[str] = set()
        self._stops = False
        self._wake = threading.Condition()
        self._seconds_per_job = 1.0
        """A moving mean, for the advice when to come back."""
        self._thread = threading.Thread(target=self._work, name="rheostat-engine", daemon=True)

    # -- from any thread

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the worker works."""
        return self._thread.is_alive()

    def check(self, job: Job) -> None:
        """Refuse a job that could never run here.

        Raises:
            SettingError: it is larger than the server.
        """
        self.scheduler.check(ticket_of(job, 0.0))

    def submit(self, job: Job, sink: Sink) -> None:
        """Take a job into the queue; its events go to `sink`.

        Raises:
            SettingError: it could never run here.
            Full: too many wait.
            Draining: nothing new is taken.
        """
        now = time.monotonic()
        with self._wake:
            self.scheduler.offer(ticket_of(job, now))
            self._jobs[job.id] = _Running(job, sink, now)
            self._wake.notify()

    def cancel(self, id: str) -> None:
        """Stop a job, whatever it is doing; no event follows once the worker has seen it."""
        with self._wake:
            if id in self._jobs:
                self._cancelled.add(id)
                self._wake.notify()

    def drain(self) -> None:
        """Take nothing new and finish what there is."""
        with self._wake:
            self.scheduler.is_draining = True
            self._wake.notify()

    def stop(self, timeout: float = 10.0) -> None:
        """End the worker; jobs that are not done fail."""
        with self._wake:
            self.scheduler.is_draining = self._stops = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def retry_after(self) -> int:
        """Seconds after which a place in the queue should be free."""
        with self._wake:
            return max(1, min(60, round(self._seconds_per_job)))

    def state(self) -> dict[str, float]:
        """What there is to do now."""
        with self._wake:
            return {
                "running": len(self.scheduler.running),
                "rows": self.scheduler.num_rows,
                "waiting": len(self.scheduler.waiting),
                "cache_share": self.scheduler.cache_share,
                "level": self.adaptive.level if self.adaptive else 0.0,
            }

    # -- the worker

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    while self.scheduler.is_idle and not self._cancelled and not self._stops:
                        self._wake.wait()
                    if self._stops:
                        break
                    self._drop_cancelled()
                    tickets = self.scheduler.admit()
                    level = self._look()
                self._join([self._jobs[ticket.id] for ticket in tickets], level)
                self._step(level)
                self._drop_late()
        except BaseException:
            logger.exception("the worker ends")
            raise
        finally:
            self._fail_all()

    def _look(self) -> float:
        if self.adaptive is None:
            return 0.0
        now = time.monotonic()
        return self.adaptive.look(now, self.scheduler.longest_wait(now))

    def _drop_cancelled(self) -> None:
        ids, self._cancelled = self._cancelled, set()
        for id in ids:
            if (one := self._jobs.get(id)) is not None:
                self._forget(one, "cancelled")

    def _drop_late(self) -> None:
        now = time.monotonic()
        for one in list(self._jobs.values()):
            if one.job.deadline is not None and now > one.job.deadline:
                self._fail(one, 504, "the time limit of this server has passed", "timeout")

    def _fail_all(self) -> None:
        with self._wake:
            self.scheduler.is_draining = True
            jobs = list(self._jobs.values())
        for one in jobs:
            self._fail(one, 503, "the server is shutting down", "aborted")

    def _forget(self, one: _Running, reason: str) -> None:
        for line in one.lines:
            if not line.is_done:
                self.backend.leave(line.row)
        with self._wake:
            self.scheduler.remove(one.job.id)
            self._jobs.pop(one.job.id, None)
        self._report(one, reason)

    def _fail(self, one: _Running, status: int, message: str, reason: str = "error") -> None:
        self._forget(one, reason)
        self._send(one, Failed(status, message))

    def _send(self, one: _Running, event: Event) -> None:
        try:
            one.sink(event)
        except Exception:  # the receiver is gone, with its event loop
            logger.debug("nobody takes the events of %s", one.job.id)

    # -- joining

    def _join(self, joined: list[_Running], level: float) -> None:
        if not joined:
            return
        now = time.monotonic()
        joins = [self._prepare(one, level, now) for one in joined]
        try:
            self.backend.join(joins)
        except Exception:
            for each in joins:
                self._take_back(each)
            self._join_alone(joined, joins)
            return
        for one in joined:
            one.read = time.monotonic()

    def _join_alone(self, joined: list[_Running], joins: list[Join]) -> None:
        """Find out whose prompt it was: the others go on."""
        for one, join in zip(joined, joins, strict=True):
            try:
                self.backend.join([join])
                one.read = time.monotonic()
            except Exception:
                logger.exception("request %s failed at its prompt", one.job.id)
                self._take_back(join)
                self._fail(one, 500, "this request failed; others did not")

    def _take_back(self, join: Join) -> None:
        for row in join.rows:
            self.backend.leave(row)

    def _prepare(self, one: _Running, level: float, now: float) -> Join:
        job = one.job
        one.joined = now
        compute = self._compute(one, job.prefill_compute, level)
        for place in range(job.n):
            row = Row(job.prompt, one.meter)
            generator = torch.Generator().manual_seed((job.seed + place) % 2**63)
            one.lines.append(_Line(row, place, Writer(self._decode, job.stops), generator, compute=compute))
        return Join([line.row for line in one.lines], compute)

    def _compute(self, one: _Running, asked: float, level: float) -> float:
        found = lowered(asked, one.job.compute_min, level, self.adapted.dial.low)
        one.lowest = min(one.lowest, found)
        one.is_lowered |= found < asked
        return found

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    # -- stepping

    def _step(self, level: float) -> None:
        """Draw a token for every row, and read those of the rows that go on."""
        running = [one for one in list(self._jobs.values()) if one.lines]
        for one in running:
            try:
                self._draw(one)
            except Exception:
                logger.exception("request %s failed", one.job.id)
                self._fail(one, 500, "this request failed; others did not")
        lines = [(one, line) for one in running if one.job.id in self._jobs for line in one.lines if not line.is_done]
        if not lines:
            return
        for one, line in lines:
            line.compute = self._compute(one, one.job.compute, level)
        self._read(lines)

    def _read(self, lines: list[tuple[_Running, _Line]]) -> None:
        rows = [line.row for _, line in lines]
        if self.backend.is_batched:
            try:
                self.backend.step(rows, [line.newest for _, line in lines], [line.compute for _, line in lines])
                return
            except Exception:
                logger.exception("a step of %d rows failed; each goes by itself", len(rows))
        for one, line in lines:
            if one.job.id in self._jobs:
                self._read_alone(one, line)

    def _read_alone(self, one: _Running, line: _Line) -> None:
        try:
            self.backend.step([line.row], [line.newest], [line.compute])
        except Exception:
            logger.exception("request %s failed", one.job.id)
            self._fail(one, 500, "this request failed; others did not")

    def _draw(self, one: _Running) -> None:
        job = one.job
        for line in one.lines:
            if line.is_done:
                continue
            logits = line.row.logits
            if not bool(logits.isfinite().any()) or bool(logits.isnan().any()):
                raise FloatingPointError("logits that are not numbers")
            token = int(sample(logits[None], job.sampling, line.generator)[0])
            line.newest = token
            self._note_time(one)
            if token in self.end_ids and not job.ignores_end:
                self._end_line(one, line, "stop")
                continue
            self._send(one, self._token(job, line, token, line.writer.push(token)))
            if line.writer.is_stopped:
                self._end_line(one, line, "stop")
            elif len(line.writer.token_ids) >= job.max_new_tokens:
                self._end_line(one, line, "length")

    def _note_time(self, one: _Running) -> None:
        now = time.monotonic()
        if self.watcher is not None:
            self.watcher.token(now - one.newest if one.newest else None)
        one.first, one.newest = one.first or now, now

    def _token(self, job: Job, line: _Line, token: int, text: str) -> Token:
        logprob, top = None, ()
        if job.num_top is not None:
            scores = line.row.logits.log_softmax(-1)
            logprob = float(scores[token])
            best = scores.topk(job.num_top) if job.num_top else None
            if best is not None:
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                top = tuple(TokenProbability(id, value) for id, value in pairs)  # type: ignore[assignment]
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

    def _end_line(self, one: _Running, line: _Line, reason: str) -> None:
        line.is_done = True
        rest = line.writer.finish()
        self.backend.leave(line.row)
        self._send(one, RowDone(line.place, "stop" if line.writer.is_stopped else reason, rest))
        with self._wake:
            if not self.scheduler.row_done(one.job.id):
                return
            self._jobs.pop(one.job.id, None)
        self._send(one, Done(self._report(one, reason)))

    # -- the bill

    def _report(self, one: _Running, reason: str) -> Bill:
        bill = self._bill(one, time.monotonic())
        with self._wake:
            self._seconds_per_job += 0.2 * (bill.total_seconds - self._seconds_per_job)
        if self.watcher is not None:
            self.watcher.finished(reason, bill)
        return bill

    def _bill(self, one: _Running, now: float) -> Bill:
        job, meter = one.job, one.meter
        joined, first = one.joined or now, one.first or now
        return Bill(
            asked={"prefill": job.prefill_compute, "decode": job.compute},
            compute=meter.compute,
            compute_with_context=meter.compute_with_context,
            ffn_fraction=meter.ffn_fraction,
            flops=meter.cost.flops.total,
            dense_flops=meter.dense.flops.total,
            tokens_by_width=tokens_by_width(meter),
            num_prompt_tokens=len(job.prompt),
            num_new_tokens=sum(len(line.writer.token_ids) for line in one.lines),
            num_draft_tokens=sum(meter.speculation.drafted),
            num_accepted_tokens=sum(meter.speculation.accepted),
            is_lowered=one.is_lowered,
            lowest=min(one.lowest, job.compute, job.prefill_compute),
            queue_seconds=joined - one.arrived,
            prefill_seconds=(one.read or joined) - joined,
            first_token_seconds=first - one.arrived,
            decode_seconds=max(0.0, one.newest - first) if one.newest else 0.0,
            total_seconds=now - one.arrived,
        )


def tokens_by_width(meter: Meter) -> dict[str, int]:
    """FFN width as a fraction -> how often a token took it in a layer that chooses."""
    found: dict[str, int] = {}
    for counts, sizes in meter.widths_taken():
        for count, size in zip(counts.tolist(), sizes.tolist(), strict=True):
            name = f"{size / meter.ffn_size:.4g}"
            found[name] = found.get(name, 0) + count
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def ticket_of(job: Job, arrived: float) -> Ticket:
    """What the scheduler needs to know of a job."""
    return Ticket(
        id=job.id,
        num_prompt_tokens=len(job.prompt),
        max_new_tokens=job.max_new_tokens,
        num_rows=job.n,
        arrived=arrived,
    )


def end_ids(adapted: Adapted, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    configured = adapted.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return frozenset(end for end in ends if end is not None)
