"""Who waits and who runs: pure data."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.serve.scheduler import Draining, Full, Limits, Scheduler, Ticket


def ticket(id: str, prompt: int = 10, new: int = 10, rows: int = 1, arrived: float = 0.0) -> Ticket:
    return Ticket(id=id, num_prompt_tokens=prompt, max_new_tokens=new, num_rows=rows, arrived=arrived)


def ids(tickets: list[Ticket]) -> list[str]:
    return [one.id for one in tickets]


def test_first_come_first_served_up_to_the_rows():
    one = Scheduler(Limits(rows=2))
    for name in "abc":
        one.offer(ticket(name))
    assert ids(one.admit()) == ["a", "b"]
    assert ids(one.admit()) == []
    assert one.row_done("a")
    assert ids(one.admit()) == ["c"]


def test_a_large_request_is_not_overtaken():
    one = Scheduler(Limits(rows=3))
    for each in (ticket("a", rows=2), ticket("large", rows=3), ticket("small")):
        one.offer(each)
    assert ids(one.admit()) == ["a"]
    assert not one.row_done("a")
    assert ids(one.admit()) == []
    assert one.row_done("a")
    assert ids(one.admit()) == ["large"]


def test_memory_is_rows_times_the_longest():
    one = Scheduler(Limits(rows=8, cache_tokens=100))
    one.offer(ticket("a", 30, 20))
    one.offer(ticket("b", 1, 1))
    one.offer(ticket("c", 1, 1))
    assert ids(one.admit()) == ["a", "b"]  # 2 rows of 50
    assert one.cache_share == 1.0
    one.row_done("a")
    assert ids(one.admit()) == ["c"]


def test_prompts_are_read_a_few_at_a_time_and_a_long_one_alone():
    one = Scheduler(Limits(rows=8, prefill_tokens=25))
    for name, length in (("a", 10), ("b", 10), ("c", 10), ("d", 400)):
        one.offer(ticket(name, length))
    assert ids(one.admit()) == ["a", "b"]
    assert ids(one.admit()) == ["c"]
    assert ids(one.admit()) == ["d"]


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
    one.admit()
    one.offer(ticket("c"))
    one.is_draining = True
    with pytest.raises(Draining):
        one.offer(ticket("d"))
    one.row_done("a")
    assert ids(one.admit()) == ["b"]  # what waits is still served


def test_removal_frees_a_place_waiting_or_running():
    one = Scheduler(Limits(rows=1))
    for name in "abc":
        one.offer(ticket(name))
    one.admit()
    assert one.remove("b")
    assert one.remove("a")
    assert not one.remove("a")
    assert ids(one.admit()) == ["c"]


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
    st.lists(st.tuples(st.sampled_from(["offer", "admit", "done", "remove"]), st.integers(0, 9), st.integers(1, 60))),
)
def test_limits_hold_and_nothing_is_lost(steps: list[tuple[str, int, int]]):
    limits = Limits(rows=4, queue=3, cache_tokens=120, prefill_tokens=50)
    one = Scheduler(limits)
    alive: set[str] = set()
    order: list[str] = []
    for number, (what, pick, size) in enumerate(steps):
        if what == "offer":
            try:
                one.offer(ticket(f"r{number}", size, 5, 1 + pick % 4))
                alive.add(f"r{number}")
            except (Full, SettingError):
                pass
        elif what == "admit":
            before = ids(list(one.waiting))
            joined = ids(one.admit())
            assert joined == before[: len(joined)]
            order += joined
        elif what == "done" and one.running:
            name = list(one.running)[pick % len(one.running)]
            if one.row_done(name):
                alive.discard(name)
        elif what == "remove" and alive:
            name = sorted(alive)[pick % len(alive)]
            assert one.remove(name)
            alive.discard(name)
        assert one.num_rows <= limits.rows
        assert one.cache_share <= 1
        assert len(one.waiting) <= limits.queue
        assert alive == set(one.running) | set(ids(list(one.waiting)))
    assert order == sorted(order, key=lambda name: int(name[1:]))
