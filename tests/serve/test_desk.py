"""The table of jobs, without a model and without a thread."""

from __future__ import annotations

import threading
import time

import pytest

from rheostat.serve.adaptive import Adaptive
from rheostat.serve.jobs import Bill, Done, Failed, RowDone
from rheostat.serve.reading import Reader
from rheostat.serve.scheduler import Draining, Full
from tests.serve.fakes import FakeBackend, Letters, desk, running, submit
from tests.tiny import SMOLLM2


class Notes:
    """A watcher that writes down why jobs ended."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def finished(self, reason: str, bill: Bill) -> None:
        self.reasons.append(reason)

    def token(self, seconds: float | None) -> None:
        pass


def test_a_round_has_the_prompts_that_fit_and_the_rest_wait():
    one = desk(FakeBackend(), rows=2)
    for id in "abc":
        submit(one, id)
    found = one.next_round()
    assert found is not None
    assert [job.job.id for job, _ in found.reads] == ["a", "b"]
    assert one.state() == {"running": 2, "rows": 2, "waiting": 1, "cache_share": 12 / 65536, "level": 0.0}


def test_who_is_cancelled_is_told_nothing_and_counted():
    notes = Notes()
    one = desk(FakeBackend(), watcher=notes)
    gone, stays = submit(one, "gone"), submit(one, "stays")
    one.cancel("gone")
    one.cancel("never came")
    found = one.next_round()
    assert found is not None
    assert [job.job.id for job, _ in found.reads] == ["stays"]
    assert gone == stays == []
    assert notes.reasons == ["cancelled"]


def test_a_closed_desk_takes_nothing_and_ends_the_worker_when_told():
    one = desk(FakeBackend(), queue=1)
    submit(one, "a")
    with pytest.raises(Full):
        submit(one, "b")
    one.close()
    with pytest.raises(Draining):
        submit(one, "c")
    assert one.next_round() is not None  # what there is is finished
    one.close(stops=True)
    assert one.next_round() is None


def test_an_idle_worker_wakes_when_a_job_comes():
    one = desk(FakeBackend())
    found = []
    worker = threading.Thread(target=lambda: found.append(one.next_round()))
    worker.start()
    submit(one, "a")
    worker.join(10)
    assert [job.job.id for job, _ in found[0].reads] == ["a"]


def test_a_job_ends_with_the_last_of_its_rows():
    backend, notes = FakeBackend(), Notes()
    one = desk(backend, watcher=notes)
    events = submit(one, "a", n=2)
    found = one.next_round()
    assert found is not None
    Reader(one, backend, Letters(), 0.5, SMOLLM2).read(found.reads, 0.0)
    job = running(one, "a")
    one.end_line(job, job.lines[1], "length")
    assert [type(event) for event in events] == [RowDone]
    assert one.holds(job)
    one.end_line(job, job.lines[0], "stop")
    assert [type(event) for event in events] == [RowDone, RowDone, Done]
    assert (one.holds(job), backend.held, notes.reasons) == (False, set(), ["stop"])


def test_who_waited_or_took_too_long_is_failed():
    one = desk(FakeBackend(), rows=1, queue_seconds=0.01)
    late = submit(one, "late", deadline=time.monotonic() - 1)
    waits = submit(one, "waits")
    one.next_round()
    time.sleep(0.02)
    one.drop_late()
    assert [(type(event), event.status) for event in late + waits] == [(Failed, 504), (Failed, 429)]  # type: ignore[union-attr]
    assert one.scheduler.is_idle


def test_a_receiver_that_is_gone_harms_nobody():
    one = desk(FakeBackend())
    submit(one, "a")
    job = running(one, "a")
    job.sink = lambda event: 1 / 0  # type: ignore[assignment,return-value]
    one.fail_all()
    assert not one.holds(job)


def test_the_dial_follows_the_wait_of_the_head_of_the_queue():
    one = desk(FakeBackend(), Adaptive(target=0.01), rows=1)
    submit(one, "a")
    submit(one, "b")
    assert one.next_round().level == 0.0  # type: ignore[union-attr]
    time.sleep(0.3)
    assert one.next_round().level > 0  # type: ignore[union-attr]
