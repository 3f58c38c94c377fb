"""Prompts on their way into the batch, without a model."""

from __future__ import annotations

from rheostat.serve.jobs import Failed
from rheostat.serve.reading import Reader
from tests.serve.fakes import FakeBackend, Letters, desk, running, submit
from tests.tiny import SMOLLM2


def test_prompts_of_a_round_are_read_together_each_at_its_own_dial():
    backend = FakeBackend()
    one = desk(backend)
    submit(one, "a", prefill_compute=0.9)
    submit(one, "b", prefill_compute=0.7, n=2)
    Reader(one, backend, Letters(), 0.5, SMOLLM2).read(one.next_round().reads, 0.0)  # type: ignore[union-attr]
    assert backend.calls == [("join", [0.9, 0.7])]
    assert len(backend.held) == 3
    assert [job.job.id for job in one.writing()] == ["a", "b"]


def test_under_pressure_only_those_who_allow_it_are_lowered():
    backend = FakeBackend()
    one = desk(backend)
    submit(one, "allows", compute_min=0.6)
    submit(one, "does not")
    Reader(one, backend, Letters(), 0.5, SMOLLM2).read(one.next_round().reads, 1.0)  # type: ignore[union-attr]
    assert backend.calls == [("join", [0.6, 1.0])]
    assert running(one, "allows").is_lowered
    assert not running(one, "does not").is_lowered


def test_a_long_prompt_is_read_piece_by_piece_and_writes_only_then():
    backend = FakeBackend()
    one = desk(backend, prefill_tokens=3)
    submit(one, "long", prompt=range(7))
    reader = Reader(one, backend, Letters(), 0.5, SMOLLM2)
    for _ in range(3):
        assert one.writing() == []
        reader.read(one.next_round().reads, 0.0)  # type: ignore[union-attr]
    assert backend.calls == [("read", 0, 3), ("read", 3, 6), ("read", 6, 7)]
    assert [job.job.id for job in one.writing()] == ["long"]


def test_a_prompt_that_breaks_is_found_and_the_others_are_read():
    backend = FakeBackend(lambda rows: MemoryError() if any(len(row.prompt) == 5 for row in rows) else None)
    one = desk(backend)
    events = {id: submit(one, id, prompt=range(length)) for id, length in (("a", 2), ("bad", 5), ("c", 3))}
    Reader(one, backend, Letters(), 0.5, SMOLLM2).read(one.next_round().reads, 0.0)  # type: ignore[union-attr]
    assert [job.job.id for job in one.writing()] == ["a", "c"]
    assert [type(event) for event in events["bad"]] == [Failed]
    assert len(backend.held) == 2
