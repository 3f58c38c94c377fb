"""Continuous batching: one thread that runs the model, and requests that join and leave between its steps.

The thread goes round and round: the desk says what to do (`desk.py`), the reader reads prompts or pieces of them
(`reading.py`), the stepper draws a token for every row and reads those of the rows that go on (`stepping.py`).
Other threads only `submit`, `cancel`, `drain` and `stop`.
"""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import torch

from rheostat.adapted import Adapted
from rheostat.serve.adaptive import Adaptive
from rheostat.serve.backend import Backend
from rheostat.serve.desk import Desk, Watcher
from rheostat.serve.jobs import Job, Sink
from rheostat.serve.reading import Reader
from rheostat.serve.running import ticket_of
from rheostat.serve.scheduler import Scheduler
from rheostat.serve.stepping import Stepper

logger = logging.getLogger(__name__)


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
        self.scheduler.reads_pieces = backend.reads_pieces
        self.adaptive = adaptive
        self._desk = Desk(backend, self.scheduler, adaptive, watcher)
        own = copy.deepcopy(tokenizer)  # the worker's: the other one is encoding meanwhile
        low = adapted.dial.low
        self._reader = Reader(self._desk, backend, own, low, adapted.geometry)
        self._stepper = Stepper(self._desk, backend, end_ids(adapted, tokenizer), low, adapted.geometry)
        self._thread = threading.Thread(target=self._work, name="rheostat-engine", daemon=True)

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
        self._desk.submit(job, sink)

    def cancel(self, id: str) -> None:
        """Stop a job, whatever it is doing; no event follows once the worker has seen it."""
        self._desk.cancel(id)

    def drain(self) -> None:
        """Take nothing new and finish what there is."""
        self._desk.close()

    def stop(self, timeout: float = 10.0) -> None:
        """End the worker; jobs that are not done fail."""
        self._desk.close(stops=True)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def retry_after(self) -> int:
        """Seconds after which a place in the queue should be free."""
        return self._desk.retry_after()

    def state(self) -> dict[str, float]:
        """What there is to do now."""
        return self._desk.state()

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while (found := self._desk.next_round()) is not None:
                self._reader.read(found.reads, found.level)
                self._stepper.step(found.level)
                self._desk.drop_late()
        except BaseException:
            logger.exception("the worker ends")
            raise
        finally:
            self._desk.fail_all()


def end_ids(adapted: Adapted, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    configured = adapted.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return frozenset(end for end in ends if end is not None)
