"""Who waits and who runs: pure data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.serve.scheduler import Draining, Full, Limits, Piece, Scheduler, Ticket


def ticket(id: str, prompt: int = 10, new: int = 10, rows: int = 1, arrived: float = 0.0) -> Ticket:
    return Ticket(id=id, num_prompt_tokens=prompt, max_new_tokens=new, num_rows=rows, arrived=arrived)


def ids(tickets: Sequence[Ticket | Piece]) -> list[str]:
    return [one.id for one in tickets]


def test_first_come_first_served_up_to_the_rows():
    one = Scheduler(Limits(rows=2))
    for name in "abc":
        one.offer(ticket(name))
    assert ids(one.plan()) == ["a", "b"]
    assert ids(one.plan()) == []
    assert one.row_done("a")
    assert ids(one.plan()) == ["c"]


def test_a_large_request_is_not_overtaken():
    one = Scheduler(Limits(rows=3))
    for each in (ticket("a", rows=2), ticket("large", rows=3), ticket("small")):
        one.offer(each)
    assert ids(one.plan()) == ["a"]
    assert not one.row_done("a")
    assert ids(one.plan()) == []
    assert one.row_done("a")
    assert ids(one.plan()) == ["large"]


def test_memory_is_rows_times_the_longest():
    one = Scheduler(Limits(rows=8, cache_tokens=100))
    one.offer(ticket("a", 30, 20))
    one.offer(ticket("b", 1, 1))
    one.offer(ticket("c", 1, 1))
    assert ids(one.plan()) == ["a", "b"]  # 2 rows of 50
    assert one.cache_share == 1.0
    one.row_done("a")
    assert ids(one.plan()) == ["c"]


def spans(pieces: list[Piece]) -> list[tuple[str, int, int]]:
    return [(one.id, one.start, one.stop) for one in pieces]


def test_prompts_are_read_a_few_at_a_time_and_a_long_one_in_pieces():
    one = Scheduler(Limits(rows=8, prefill_tokens=25))
    for name, length in (("a", 10), ("b", 10), ("c", 10), ("d", 60)):
        one.offer(ticket(name, length))
    assert spans(one.plan()) == [("a", 0, 10), ("b", 0, 10)]
    assert spans(one.plan()) == [("c", 0, 10)]
    assert [spans(one.plan()) for _ in range(4)] == [[("d", 0, 25)], [("d", 25, 50)], [("d", 50, 60)], []]


def test_short_prompts_take_turns_with_the_pieces_of_a_long_one():
    one = Scheduler(Limits(rows=8, prefill_tokens=25))
    for name, length in (("long", 60), ("a", 20), ("b", 20), ("too", 30), ("c", 1)):
        one.offer(ticket(name, length))
    read = [spans(one.plan()) for _ in range(7)]
    assert read[:5] == [[("long", 0, 25)], [("a", 0, 20)], [("long", 25, 50)], [("b", 0, 20)], [("long", 50, 60)]]
    assert read[5:] == [[("too", 0, 25)], [("c", 0, 1)]]  # one long prompt at a time, and none overtakes it


def test_where_a_prompt_has_to_be_read_at_once_it_is_read_alone():
    one = Scheduler(Limits(rows=8, prefill_tokens=25), reads_pieces=False)
    for name, length in (("a", 10), ("d", 60), ("b", 10)):
        one.offer(ticket(name, length))
    assert [spans(one.plan()) for _ in range(3)] == [[("a", 0, 10)], [("d", 0, 60)], [("b", 0, 10)]]


def test_nothing_more_is_read_of_a_prompt_that_is_gone():
    one = Scheduler(Limits(rows=2, prefill_tokens=25))
    for name, length in (("long", 60), ("a", 40)):
        one.offer(ticket(name, length))
    assert spans(one.plan()) == [("long", 0, 25)]
    assert one.remove("long")
    assert [spans(one.plan()) for _ in range(3)] == [[("a", 0, 25)], [("a", 25, 40)], []]


def test_what_can_never_run_is_refused_at_once():
    one = Scheduler(Limits(rows=2, cache_tokens=100))
    with pytest.raises(SettingError, match="n=3: must be at most 2"):
        one.offer(ticket("a", rows=3))
    with pytest.raises(SettingError, match="request of 101 tokens"):
        one.offer(ticket("a", 100, 1))
    assert one.is_idle


def test_the_queue_is_bounded_and_draining_takes_nothing():
    one = Scheduler(Limits(rows=1, queue=2))
    one.offer(ticket("a"))
    one.offer(ticket("b"))
    with pytest.raises(Full):
        one.offer(ticket("c"))
    one.plan()
    one.offer(ticket("c"))
    one.is_draining = True
    with pytest.raises(Draining):
        one.offer(ticket("d"))
    one.row_done("a")
    assert ids(one.plan()) == ["b"]  # what waits is still served


def test_removal_frees_a_place_waiting_or_running():
    one = Scheduler(Limits(rows=1))
    for name in "abc":
        one.offer(ticket(name))
    one.plan()
    assert one.remove("b")
    assert one.remove("a")
    assert not one.remove("a")
    assert ids(one.plan()) == ["c"]


def test_the_wait_of_the_head():
    one = Scheduler()
    assert one.longest_wait(5.0) == 0
    one.offer(ticket("a", arrived=2.0))
    assert one.longest_wait(5.0) == 3.0


@pytest.mark.parametrize("name", ["rows", "queue", "cache_tokens", "prefill_tokens"])
def test_limits_are_checked(name: str):
    with pytest.raises(SettingError, match=f"{name}=0: must be 1 or more"):
        Limits(**{name: 0})


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["offer", "plan", "done", "remove"]), st.integers(0, 9), st.integers(1, 60))),
)
def test_limits_hold_and_nothing_is_lost(steps: list[tuple[str, int, int]]):
    limits = Limits(rows=4, queue=3, cache_tokens=120, prefill_tokens=20)
    one = Scheduler(limits)
    alive: dict[str, int] = {}
    read: dict[str, int] = {}
    order: list[str] = []
    for number, (what, pick, size) in enumerate(steps):
        if what == "offer":
            try:
                one.offer(ticket(f"r{number}", size, 5, 1 + pick % 4))
                alive[f"r{number}"] = size
            except (Full, SettingError):
                pass
        elif what == "plan":
            pieces = one.plan()
            assert len(pieces) <= 1 or all(piece.is_whole for piece in pieces)
            assert sum(piece.stop - piece.start for piece in pieces) <= limits.prefill_tokens
            for piece in pieces:
                assert piece.start == read.get(piece.id, 0) < piece.stop <= alive[piece.id]
                read[piece.id] = piece.stop
                order += [piece.id] if piece.start == 0 else []
        elif what == "done" and (ready := [name for name in one.running if read[name] == alive[name]]):
            name = ready[pick % len(ready)]
            if one.row_done(name):
                del alive[name]
        elif what == "remove" and alive:
            name = sorted(alive)[pick % len(alive)]
            assert one.remove(name)
            del alive[name]
        assert one.num_rows <= limits.rows
        assert one.cache_share <= 1
        assert len(one.waiting) <= limits.queue
        assert set(alive) == set(one.running) | set(ids(list(one.waiting)))
    for _ in range(60):  # what has joined is read to its end
        read |= {piece.id: piece.stop for piece in one.plan()}
    assert all(read[name] == alive[name] for name in one.running)
    assert order == sorted(order, key=lambda name: int(name[1:]))
