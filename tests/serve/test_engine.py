"""Rows that join and leave: each answer is what the model gives alone, whatever else is in the batch."""

from __future__ import annotations

import itertools
import queue
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rheostat import holding
from rheostat.decode import stream
from rheostat.meter import Meter
from rheostat.sampling import Sampling
from rheostat.serve import adaptive as adapting
from rheostat.serve import native
from rheostat.serve.adaptive import Adaptive
from rheostat.serve.backend import Backend, Join, Row, make_backend
from rheostat.serve.engine import Engine
from rheostat.serve.jobs import Done, Failed, Job, RowDone, Token
from rheostat.serve.native import NativeBackend
from rheostat.serve.scheduler import Draining, Limits, Scheduler
from rheostat.serve.stock import StockBackend
from rheostat.spending import spend
from tests.serve.conftest import Tiny, until


@contextmanager
def working(
    tiny: Tiny, backend: Backend | None = None, *, limits: Limits | None = None, **settings: Any
) -> Iterator[Engine]:
    engine = Engine(
        tiny.adapted, tiny.tokenizer, backend or make_backend(tiny.adapted), Scheduler(limits or Limits()), **settings
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        assert not engine.is_alive


class Inbox:
    """What came of a job."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.seen: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.put(event)

    def wait(self) -> Any:
        """The last event, after which none comes."""
        while not self.seen or not isinstance(self.seen[-1], Done | Failed):
            self.seen.append(self.events.get(timeout=30))
        return self.seen[-1]

    def begin(self) -> None:
        """Wait for the first event."""
        self.seen.append(self.events.get(timeout=30))

    def text(self, row: int = 0) -> str:
        """Of one row."""
        self.wait()
        return "".join(one.text for one in self.seen if isinstance(one, Token | RowDone) and one.row == row)


def job(tiny: Tiny, prompt: str = "rivers", compute: float = 1.0, new: int = 16, **settings: Any) -> Job:
    ids = tiny.tokenizer(prompt)["input_ids"]
    id = f"{prompt}-{compute}-{random.random()}"
    phases = {"prefill_compute": compute, "compute": compute}
    return Job(id=id, prompt=ids, max_new_tokens=new, **{"is_held": True} | phases | settings)


def submit(engine: Engine, one: Job) -> Inbox:
    inbox = Inbox()
    engine.submit(one, inbox)
    return inbox


@pytest.fixture(params=["native", "stock"])
def backend(request: pytest.FixtureRequest, tiny: Tiny) -> Backend:
    found = make_backend(tiny.adapted, request.param, "auto")
    assert isinstance(found, NativeBackend if request.param == "native" else StockBackend)
    return found


def test_mixed_dials_and_lengths_are_not_mixed_up(tiny: Tiny, backend: Backend):
    computes = (1.0, 0.9, 0.8, tiny.adapted.dial.low)
    jobs = [job(tiny, "water " * (1 + k % 5) + str(k), computes[k % 4], 3 + 5 * (k % 4)) for k in range(10)]
    with working(tiny, backend, limits=Limits(rows=5, prefill_tokens=40)) as engine:
        inboxes = [submit(engine, one) for one in jobs]
        for one, inbox in zip(jobs, inboxes, strict=True):
            prompt = tiny.tokenizer.decode(one.prompt)
            assert inbox.text() == tiny.offline(prompt, one.compute, one.max_new_tokens, runtime="stock")
        assert engine.scheduler.is_idle


def test_the_bill_is_that_of_the_answer_alone(tiny: Tiny, backend: Backend, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "BILL_EVERY", 4)
    jobs = [job(tiny, "water " * (1 + k), compute, 6 + k) for k, compute in enumerate((0.8, 1.0, 0.7))]
    with working(tiny, backend) as engine:
        bills = [inbox.wait().bill for inbox in [submit(engine, one) for one in jobs]]
    for one, bill in zip(jobs, bills, strict=True):
        ids = tiny.tokenizer(tiny.tokenizer.decode(one.prompt), return_tensors="pt")["input_ids"]
        with spend(one.compute, hold=True) as meter:
            for _ in stream(tiny.adapted, ids, max_new_tokens=one.max_new_tokens):
                pass
        assert bill.flops == meter.cost.flops.total
        assert bill.dense_flops == meter.dense.flops.total
        assert bill.compute == meter.compute
        assert sum(bill.tokens_by_width.values()) == (len(one.prompt) + one.max_new_tokens - 1) * 3  # layers


def test_token_widths_are_those_of_the_meter(tiny: Tiny, backend: Backend):
    one = job(tiny, "water", 0.75, 8)
    with working(tiny, backend) as engine:
        inbox = submit(engine, one)
        inbox.wait()
    widths = [event.width for event in inbox.seen if isinstance(event, Token)]
    ids = tiny.tokenizer("water", return_tensors="pt")["input_ids"]
    with spend(0.75, hold=True) as meter:
        for _ in stream(tiny.adapted, ids, max_new_tokens=8):
            pass
    assert widths == pytest.approx(meter.token_fractions()[-8:])
    assert min(widths) < 1


def test_samples_of_one_prompt_have_generators_of_their_own(tiny: Tiny, backend: Backend):
    ask: dict[str, Any] = {"sampling": Sampling(temperature=1.0), "seed": 7, "n": 3, "new": 10}
    with working(tiny, backend) as engine:
        alone = submit(engine, job(tiny, **ask))
        alone.wait()
        crowd = [submit(engine, job(tiny, "other", 0.8, 20)) for _ in range(3)]
        among = submit(engine, job(tiny, **ask))
        texts = [alone.text(row) for row in range(3)]
        assert texts == [among.text(row) for row in range(3)]
        assert len(set(texts)) == 3
        singles = [submit(engine, job(tiny, **ask | {"n": 1, "seed": 7 + row})).text() for row in range(3)]
        assert texts == singles
        for inbox in crowd:
            inbox.wait()


def test_cancelled_while_running_and_while_waiting(tiny: Tiny, backend: Backend):
    long = job(tiny, "long", 1.0, 200)
    waiting = job(tiny, "waiting", 1.0, 5)
    other = job(tiny, "other", 0.8, 30)
    with working(tiny, backend, limits=Limits(rows=2)) as engine:
        running, stays = submit(engine, long), submit(engine, other)
        never = submit(engine, waiting)
        engine.cancel(waiting.id)
        running.events.get(timeout=10)
        engine.cancel(long.id)
        assert stays.text() == tiny.offline("other", 0.8, 30)
        until(lambda: engine.scheduler.is_idle)
        assert never.events.empty()
        assert running.events.qsize() < 199
        assert submit(engine, job(tiny, "next", 0.9, 4)).text() == tiny.offline("next", 0.9, 4)


class Breaking:
    """A backend in which one prompt, or one token, breaks what it touches."""

    def __init__(self, inner: Backend, *, prompt_length: int = -1, at_step: int = -1) -> None:
        self.inner, self.prompt_length, self.at_step = inner, prompt_length, at_step
        self.name, self.is_batched, self.reads_pieces = inner.name, inner.is_batched, inner.reads_pieces
        self.can_hold = inner.can_hold

    def join(self, joins: Any) -> None:
        if any(len(one.rows[0].prompt) == self.prompt_length for one in joins):
            raise MemoryError("a prompt like this")
        self.inner.join(joins)

    def read(self, join: Any, start: int, stop: int) -> None:
        if stop == self.prompt_length:
            raise MemoryError("a prompt like this")
        self.inner.read(join, start, stop)

    def step(self, rows: Any, token_ids: Any, computes: Any) -> None:
        if self.at_step >= 0 and any(len(row.prompt) == self.at_step for row in rows):
            raise RuntimeError("a row like this")
        self.inner.step(rows, token_ids, computes)

    def leave(self, row: Any) -> None:
        self.inner.leave(row)

    @property
    def cache_bytes(self) -> int:
        return self.inner.cache_bytes


@pytest.mark.parametrize("where", ["prompt_length", "at_step"])
def test_a_request_that_breaks_touches_no_other(tiny: Tiny, backend: Backend, where: str):
    with working(tiny, Breaking(backend, **{where: 7})) as engine:
        inboxes = {name: submit(engine, job(tiny, name, 0.8, 9)) for name in ("one", "seven77", "three")}
        failed = inboxes.pop("seven77").wait()
        assert isinstance(failed, Failed)
        assert failed.status == (503 if where == "prompt_length" else 500)  # memory, and anything else
        for name, inbox in inboxes.items():
            assert inbox.text() == tiny.offline(name, 0.8, 9)
        until(lambda: engine.scheduler.is_idle)
        assert engine.is_alive


PIECES = Limits(rows=5, prefill_tokens=8)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Prompts are read in pieces of a few tokens, and held in parts of as many."""
    monkeypatch.setattr(holding, "PART", PIECES.prefill_tokens)
    return PIECES


@pytest.mark.usefixtures("pieces")
def test_long_prompts_are_read_in_pieces_with_the_same_answer_and_bill(tiny: Tiny, backend: Backend):
    jobs = [job(tiny, "water " * count + str(count), compute, 12) for count, compute in ((9, 0.8), (1, 1.0), (7, 0.75))]
    jobs += [job(tiny, "stone " * 8, 1.0, 8, n=2, sampling=Sampling(temperature=1.0), seed=3)]
    with working(tiny, backend) as engine:
        whole = [submit(engine, one) for one in jobs]
        bills = [inbox.wait().bill for inbox in whole]
    with working(tiny, backend, limits=PIECES) as engine:
        inboxes = [submit(engine, one) for one in jobs]
        for one, inbox, at_once, bill in zip(jobs, inboxes, whole, bills, strict=True):
            assert [inbox.text(row) for row in range(one.n)] == [at_once.text(row) for row in range(one.n)]
            found = inbox.wait().bill
            assert (found.flops, found.tokens_by_width) == (bill.flops, bill.tokens_by_width)


@pytest.mark.usefixtures("pieces")
def test_others_write_between_the_pieces_of_a_long_prompt(tiny: Tiny):
    backend = make_backend(tiny.adapted)
    order: list[str] = []
    watched = Watched(backend, order)
    with working(tiny, watched, limits=PIECES) as engine:
        first = submit(engine, job(tiny, "stone", 0.8, 60))
        first.begin()
        long = submit(engine, job(tiny, "water " * 10, 0.8, 4))
        short = submit(engine, job(tiny, "short", 1.0, 4))
        assert short.text() == tiny.offline("short", 1.0, 4)
        assert long.text() == tiny.offline("water " * 10, 0.8, 4)
        assert first.text() == tiny.offline("stone", 0.8, 60)
    pieces = [k for k, one in enumerate(order) if one == "piece"]
    assert len(pieces) == 8  # 60 tokens, by 8
    assert all("step" in order[a:b] for a, b in itertools.pairwise(pieces))
    assert "join" in order[pieces[0] : pieces[-1]]  # the short one has not waited for all of the long one


class Watched(Breaking):
    """A backend that writes down what it does."""

    def __init__(self, inner: Backend, order: list[str]) -> None:
        super().__init__(inner)
        self.order = order

    def join(self, joins: Any) -> None:
        self.order.append("join")
        super().join(joins)

    def read(self, join: Any, start: int, stop: int) -> None:
        assert stop - start <= PIECES.prefill_tokens
        self.order.append("piece")
        super().read(join, start, stop)

    def step(self, rows: Any, token_ids: Any, computes: Any) -> None:
        self.order.append("step")
        super().step(rows, token_ids, computes)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("how", ["cancelled", "broken"])
def test_a_prompt_that_ends_between_its_pieces(tiny: Tiny, how: str):
    backend = make_backend(tiny.adapted)
    breaks = Breaking(backend, prompt_length=24 if how == "broken" else -1)  # at its third piece
    with working(tiny, breaks, limits=PIECES) as engine:
        stays = submit(engine, job(tiny, "stone", 0.8, 40))
        stays.begin()
        long = job(tiny, "water " * 10, 0.8, 4)
        inbox = submit(engine, long)
        if how == "cancelled":
            until(lambda: long.id in engine.scheduler.running)
            engine.cancel(long.id)
        else:
            assert inbox.wait().status == 503
        assert stays.text() == tiny.offline("stone", 0.8, 40)
        until(lambda: engine.scheduler.is_idle)
        breaks.prompt_length = -1
        after = submit(engine, job(tiny, "water " * 11, 0.8, 6))
        assert after.text() == tiny.offline("water " * 11, 0.8, 6)


class Small(Breaking):
    """A backend whose memory holds so many rows."""

    def __init__(self, inner: Backend, most: int) -> None:
        super().__init__(inner)
        self.most = most

    def step(self, rows: Any, token_ids: Any, computes: Any) -> None:
        if len(rows) > self.most:
            torch.empty(1 << 50, dtype=torch.uint8)  # as PyTorch says it
        self.inner.step(rows, token_ids, computes)


def test_where_memory_runs_out_the_last_to_come_is_given_up(tiny: Tiny):
    with working(tiny, Small(make_backend(tiny.adapted), 2)) as engine:
        names = ("one", "two", "three", "four")
        inboxes = {name: submit(engine, job(tiny, name, 0.8, 30)) for name in names}
        ends = {name: inbox.wait() for name, inbox in inboxes.items()}
        lost = [name for name, end in ends.items() if isinstance(end, Failed)]
        assert lost == ["three", "four"]
        assert all("not enough memory" in ends[name].message and ends[name].status == 503 for name in lost)
        for name in ("one", "two"):
            assert inboxes[name].text() == tiny.offline(name, 0.8, 30)
        assert submit(engine, job(tiny, "five", 0.8, 6)).text() == tiny.offline("five", 0.8, 6)


def test_who_has_waited_for_too_long_is_sent_away(tiny: Tiny):
    with working(tiny, limits=Limits(rows=1, queue_seconds=0.01)) as engine:
        first = submit(engine, job(tiny, "first", 1.0, 200))
        first.begin()
        late = submit(engine, job(tiny, "late", 1.0, 4)).wait()
        assert isinstance(late, Failed)
        assert late.status == 429
        assert first.text() == tiny.offline("first", 1.0, 200)


def test_a_deadline_cuts_off(tiny: Tiny, backend: Backend):
    with working(tiny, backend) as engine:
        late = submit(engine, job(tiny, "late", 1.0, 240, deadline=time.monotonic() + 0.005)).wait()
    assert isinstance(late, Failed)
    assert late.status == 504


def test_draining_finishes_what_there_is_and_takes_nothing(tiny: Tiny, backend: Backend):
    with working(tiny, backend, limits=Limits(rows=1)) as engine:
        inboxes = [submit(engine, job(tiny, name, 0.8, 12)) for name in ("a", "b")]
        engine.drain()
        with pytest.raises(Draining):
            engine.submit(job(tiny), Inbox())
        assert [inbox.text() for inbox in inboxes] == [tiny.offline(name, 0.8, 12) for name in ("a", "b")]


def test_stopping_fails_what_is_left(tiny: Tiny, backend: Backend):
    with working(tiny, backend) as engine:
        inbox = submit(engine, job(tiny, "long", 1.0, 240))
        inbox.events.get(timeout=10)
        engine.stop()
        assert inbox.wait().status == 503


def test_memory_goes_back_when_all_have_left(tiny: Tiny):
    backend = make_backend(tiny.adapted)
    assert isinstance(backend, NativeBackend)
    with working(tiny, backend) as engine:
        before = backend.cache_bytes
        for inbox in [submit(engine, job(tiny, "water " * 20, 0.8, 60)) for _ in range(6)]:
            inbox.wait()
        until(lambda: engine.scheduler.is_idle)
        until(lambda: backend.cache_bytes == before)


def test_answers_end_at_what_was_asked_where_they_are_held_alone(tiny: Tiny, backend: Backend):
    texts = ("water stone", "rivers", "a longer one than the others are")
    with working(tiny, backend) as engine:
        bills = {
            (text, held): submit(engine, job(tiny, text, 0.8, 40, is_held=held)).wait().bill
            for text in texts
            for held in (True, False)
        }
    for text in texts:
        held, free = bills[text, True], bills[text, False]
        assert held.target == free.target == pytest.approx(0.8)
        assert held.compute == pytest.approx(0.8, abs=0.02)
        assert (held.is_held, free.is_held) == (True, False)
        assert held.flops != free.flops


def test_phases_apart_are_held_as_without_a_server(tiny: Tiny, backend: Backend):
    prompt, phases = "water stone " * 14, {"prefill": 1.0, "decode": 0.75}  # long enough for its length to steer
    one = job(tiny, prompt, new=24, prefill_compute=1.0, compute=0.75)
    with working(tiny, backend) as engine:
        inbox = submit(engine, one)
        assert inbox.text() == tiny.offline(prompt, phases, 24)
        bill = inbox.wait().bill
    weights = tiny.adapted.geometry.weights_of
    parts = (weights(len(one.prompt), 1), 23 * weights(1, 1))
    assert bill.target == pytest.approx((parts[0] + 0.75 * parts[1]) / sum(parts))


@torch.inference_mode()
def test_a_dial_that_is_lowered_in_mid_answer_is_held_from_then_on(tiny: Tiny, backend: Backend):
    row, low = Row(tiny.tokenizer("water stone")["input_ids"], Meter(keep_passes=False)), tiny.adapted.dial.low
    asked = [0.9] * 30 + [low + 0.08] * 60
    backend.join([Join([row], 0.9, True)])
    meter, spent = row.meter, []
    for compute in asked:
        backend.step([row], [int(row.logits.argmax())], [compute])
        if isinstance(backend, NativeBackend):
            backend._settle(row)
        spent.append((meter.cost.flops.flat, meter.dense.flops.flat))
    first, last = spent[29], [a - b for a, b in zip(spent[-1], spent[29], strict=True)]
    assert first[0] / first[1] == pytest.approx(0.9, abs=0.02)
    assert last[0] / last[1] == pytest.approx(low + 0.08, abs=0.02)


def test_a_busy_engine_lowers_the_dial_of_those_who_allow_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    low = tiny.adapted.dial.low
    adaptive = Adaptive(target=1e-6)
    monkeypatch.setattr(adapting, "EVERY", 0.0)
    with working(tiny, limits=Limits(rows=1), adaptive=adaptive) as engine:
        allows = [submit(engine, job(tiny, f"water {k}", 1.0, 20, compute_min=low)) for k in range(4)]
        refuses = submit(engine, job(tiny, "stone", 1.0, 8))
        bills = [inbox.wait().bill for inbox in allows]
        assert any(bill.is_lowered and bill.lowest == pytest.approx(low) and bill.compute < 1 for bill in bills)
        bill = refuses.wait().bill
        assert not bill.is_lowered
        assert bill.compute == 1.0
        assert refuses.text() == tiny.offline("stone", 1.0, 8)
