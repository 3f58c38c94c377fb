"""Tokens drawn and read, without a model: `FakeBackend` writes one more than it read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rheostat.serve.backend import Row
from rheostat.serve.desk import Desk
from rheostat.serve.jobs import Done, Event, Failed, RowDone, Token
from rheostat.serve.reading import Reader
from rheostat.serve.stepping import Stepper
from tests.serve.fakes import FakeBackend, Letters, desk, running, submit
from tests.tiny import SMOLLM2


def started(backend: FakeBackend, jobs: dict[str, dict[str, Any]]) -> tuple[Desk, Stepper, dict[str, list[Event]]]:
    """Jobs whose prompts are read."""
    one = desk(backend)
    events = {id: submit(one, id, **settings) for id, settings in jobs.items()}
    Reader(one, backend, Letters(), 0.5, SMOLLM2).read(one.next_round().reads, 0.0)  # type: ignore[union-attr]
    backend.calls.clear()
    return one, Stepper(one, backend, frozenset({9}), 0.5, SMOLLM2), events


def text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token | RowDone))


def test_rows_step_together_until_each_is_done():
    backend = FakeBackend()
    one, stepper, events = started(
        backend, {"a": {"prompt": [1], "new": 2}, "b": {"prompt": [4], "new": 4, "compute": 0.8}}
    )
    for _ in range(4):
        stepper.step(0.0)
    assert backend.calls == [
        ("step", [1, 4], [1.0, 0.8]),
        ("step", [5], [0.8]),
        ("step", [6], [0.8]),
    ]
    assert (text(events["a"]), text(events["b"])) == ("bc", "efgh")
    assert all(isinstance(found[-1], Done) for found in events.values())
    assert one.scheduler.is_idle


def test_the_end_token_ends_an_answer_unless_it_is_to_be_ignored():
    _, stepper, events = started(
        FakeBackend(), {"stops": {"prompt": [8], "new": 3}, "goes on": {"prompt": [8], "new": 3, "ignores_end": True}}
    )
    for _ in range(3):
        stepper.step(0.0)
    assert (text(events["stops"]), text(events["goes on"])) == ("i", "ijk")
    reasons = {id: [event.reason for event in found if isinstance(event, RowDone)] for id, found in events.items()}
    assert reasons == {"stops": ["stop"], "goes on": ["length"]}


def test_pressure_lowers_a_row_in_the_middle_and_lets_it_up_again():
    backend = FakeBackend()
    one, stepper, events = started(backend, {"a": {"new": 4, "compute_min": 0.6}})
    for level in (0.0, 1.0, 0.5):
        stepper.step(level)
    assert [call[2] for call in backend.calls] == [[1.0], [0.6], [0.8]]
    assert [event.compute for event in events["a"] if isinstance(event, Token)] == [1.0, 1.0, 0.6]
    assert running(one, "a").lowest == 0.6


def test_logits_that_are_not_numbers_fail_their_own_request():
    one, stepper, events = started(FakeBackend(), {"a": {}, "b": {}})
    running(one, "a").lines[0].row.logits = torch.full((16,), float("nan"))
    stepper.step(0.0)
    assert [type(event) for event in events["a"]] == [Failed]
    assert text(events["b"]) == "c"
    assert [job.job.id for job in one.writing()] == ["b"]


def test_where_memory_runs_out_the_newest_gives_way():
    def breaks(rows: Sequence[Row]) -> Exception | None:
        return MemoryError() if len(rows) > 2 else None

    backend = FakeBackend()
    one, stepper, events = started(backend, {id: {} for id in "abcd"})
    backend.breaks = breaks
    stepper.step(0.0)
    assert [job.job.id for job in one.writing()] == ["a", "b"]
    assert [events[id][-1].status for id in "cd"] == [503, 503]  # type: ignore[union-attr]


def test_a_row_that_breaks_is_found_by_stepping_each_alone():
    backend = FakeBackend()
    one, stepper, events = started(backend, {"a": {}, "bad": {"prompt": [1, 2, 3]}, "c": {}})
    backend.breaks = lambda rows: RuntimeError() if any(len(row.prompt) == 3 for row in rows) else None
    stepper.step(0.0)
    assert [job.job.id for job in one.writing()] == ["a", "c"]
    assert events["bad"][-1].status == 500  # type: ignore[union-attr]


def test_probabilities_are_those_of_the_token_and_the_likeliest():
    one, stepper, events = started(FakeBackend(), {"a": {"num_top": 2}})
    running(one, "a").lines[0].row.logits = torch.tensor([0.0, 2.0, 1.0] + [-9.0] * 13)
    stepper.step(0.0)
    (token,) = [event for event in events["a"] if isinstance(event, Token)]
    assert token.token_id == 1
    assert [top.token_id for top in token.top] == [1, 2]
    assert token.logprob == token.top[0].logprob > token.top[1].logprob
