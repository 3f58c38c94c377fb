"""The table of jobs: who is there, who is to go, and what their receivers are told.

Everything that several threads touch is here, under one lock: others put jobs in and take them back; the worker asks
what to do and says what came of it. The rest of a `Running` belongs to the worker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rheostat.serve.adaptive import Adaptive
from rheostat.serve.backend import Backend
from rheostat.serve.jobs import Bill, Done, Event, Failed, Job, RowDone, Sink
from rheostat.serve.running import Line, Running, ticket_of
from rheostat.serve.scheduler import Piece, Scheduler

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Told of what happens, in the worker's thread; for metrics."""

    def finished(self, reason: str, bill: Bill) -> None: ...

    def token(self, seconds: float | None) -> None: ...


@dataclass(frozen=True)
class Round:
    """What the worker does next: read these pieces of prompts, then a step of all that are being written."""

    reads: Sequence[tuple[Running, Piece]]
    level: float
    """Of the load-adaptive dial."""


class Desk:
    """See the module."""

    def __init__(
        self, backend: Backend, scheduler: Scheduler, adaptive: Adaptive | None, watcher: Watcher | None
    ) -> None:
        self.backend, self.scheduler, self.adaptive, self.watcher = backend, scheduler, adaptive, watcher
        self._jobs: dict[str, Running] = {}
        self._cancelled: set[str] = set()
        self._stops = False
        self._wake = threading.Condition()
        self._seconds_per_job = 1.0
        """A moving mean, for the advice when to come back."""

    # -- from any thread

    def submit(self, job: Job, sink: Sink) -> None:
        """As `Engine.submit`."""
        now = time.monotonic()
        with self._wake:
            self.scheduler.offer(ticket_of(job, now))
            self._jobs[job.id] = Running(job, sink, now)
            self._wake.notify()

    def cancel(self, id: str) -> None:
        """As `Engine.cancel`."""
        with self._wake:
            if id in self._jobs:
                self._cancelled.add(id)
                self._wake.notify()

    def close(self, *, stops: bool = False) -> None:
        """Take nothing new; with `stops`, end the worker too."""
        with self._wake:
            self.scheduler.is_draining = True
            self._stops |= stops
            self._wake.notify()

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

    # -- from the worker

    def next_round(self) -> Round | None:
        """Wait until there is something to do. Returns None once the worker is to end."""
        with self._wake:
            while self.scheduler.is_idle and not self._cancelled and not self._stops:
                self._wake.wait()
            if self._stops:
                return None
            cancelled, self._cancelled = self._cancelled, set()
            gone = [one for id in cancelled if (one := self._jobs.get(id)) is not None]
        for one in gone:
            self.forget(one, "cancelled")
        with self._wake:
            reads = [(self._jobs[piece.id], piece) for piece in self.scheduler.plan()]
            return Round(reads, self._look())

    def _look(self) -> float:
        if self.adaptive is None:
            return 0.0
        now = time.monotonic()
        return self.adaptive.look(now, self.scheduler.longest_wait(now))

    def writing(self) -> list[Running]:
        """Jobs whose prompts are read, in the order of their arrival."""
        return [one for one in list(self._jobs.values()) if one.read]

    def holds(self, one: Running) -> bool:
        """Whether a job is still there."""
        return one.job.id in self._jobs

    def drop_late(self) -> None:
        """End what has passed its time limit, or has waited for too long."""
        now = time.monotonic()
        with self._wake:
            overdue = [self._jobs[id] for id in self.scheduler.overdue(now)]
        for one in overdue:
            self.fail(one, 429, "the server is overloaded: no place came free in time", "overloaded")
        for one in list(self._jobs.values()):
            if one.job.deadline is not None and now > one.job.deadline:
                self.fail(one, 504, "the time limit of this server has passed", "timeout")

    def fail_all(self) -> None:
        """The worker ends: so does all that there is."""
        self.close()
        for one in list(self._jobs.values()):
            self.fail(one, 503, "the server is shutting down", "aborted")

    def note_token(self, one: Running) -> None:
        """A token was drawn."""
        between = one.note_token(time.monotonic())
        if self.watcher is not None:
            self.watcher.token(between)

    def end_line(self, one: Running, line: Line, reason: str) -> None:
        """A row has ended; with the last of a job's rows, so has the job."""
        line.is_done = True
        rest = line.writer.finish()
        self.backend.leave(line.row)
        self.send(one, RowDone(line.place, "stop" if line.writer.is_stopped else reason, rest))
        with self._wake:
            if not self.scheduler.row_done(one.job.id):
                return
            self._jobs.pop(one.job.id, None)
        self.send(one, Done(self._report(one, reason)))

    def fail(self, one: Running, status: int, message: str, reason: str = "error") -> None:
        """End a job that will not be finished."""
        self.forget(one, reason)
        self.send(one, Failed(status, message))

    def forget(self, one: Running, reason: str) -> None:
        """Free all that a job holds, and bill it."""
        for line in one.open_lines:
            self.backend.leave(line.row)
        with self._wake:
            self.scheduler.remove(one.job.id)
            self._jobs.pop(one.job.id, None)
        self._report(one, reason)

    def send(self, one: Running, event: Event) -> None:
        """Give an event to whoever receives the job's."""
        try:
            one.sink(event)
        except Exception:  # the receiver is gone, with its event loop
            logger.debug("nobody takes the events of %s", one.job.id)

    def _report(self, one: Running, reason: str) -> Bill:
        bill = one.bill(time.monotonic())
        with self._wake:
            self._seconds_per_job += 0.2 * (bill.total_seconds - self._seconds_per_job)
        if self.watcher is not None:
            self.watcher.finished(reason, bill)
        return bill
