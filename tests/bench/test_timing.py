"""The timing core, with clocks that tests set."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rheostat.bench.timing import Summary, fastest, ratios, summarise, take_turns, threads, waiter


class FakeClock:
    """Stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("values", "low", "median", "high"),
    [
        ([3.0], 3.0, 3.0, 3.0),
        ([1.0, 2.0], 1.25, 1.5, 1.75),
        ([5.0, 1.0, 3.0, 2.0, 4.0], 2.0, 3.0, 4.0),
        ([1.0, 1.0, 1.0, 100.0], 1.0, 1.0, 25.75),
    ],
)
def test_median_and_quartiles(values, low, median, high):
    assert summarise(values) == Summary(median=median, low=low, high=high, rounds=len(values))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_quartiles_lie_around_the_median_and_within_the_rounds(values):
    found = summarise(values)
    assert found.median == pytest.approx(statistics.median(values))
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.low <= found.median + slack
    assert found.median - slack <= found.high <= max(values) + slack


def test_ratios_compare_round_with_round():
    # A machine that slows down tenfold halfway: each round still says twice as fast.
    base, other = [1.0, 1.0, 10.0, 10.0], [0.5, 0.5, 5.0, 5.0]
    assert ratios(base, other) == Summary(median=2.0, low=2.0, high=2.0, rounds=4)
    with pytest.raises(ValueError, match="shorter"):
        ratios(base, other[:3])


def test_sides_take_turns_and_the_first_round_is_thrown_away():
    calls, told = [], []

    def trial(name):
        def run():
            calls.append(name)
            return {"x": float(len(calls))}

        return run

    times = take_turns(
        {name: trial(name) for name in "abc"},
        rounds=2,
        progress=lambda what, done, total: told.append((what, done, total)),
        what="cell",
    )
    assert "".join(calls) == "abcabcabc"
    assert times == {"a": {"x": [4.0, 7.0]}, "b": {"x": [5.0, 8.0]}, "c": {"x": [6.0, 9.0]}}
    assert told == [("cell", done, 9) for done in range(10)]
    assert take_turns({"a": trial("a")}, rounds=1, warmups=0) == {"a": {"x": [10.0]}}


def test_the_fastest_run_counts_and_the_first_does_not():
    clock, lengths = FakeClock(), iter([0.1, 5.0, 3.0, 4.0])
    waits = []

    def action() -> None:
        clock.now += next(lengths)

    assert fastest(action, lambda: waits.append(clock.now), clock, repeats=3) == pytest.approx(3.0)
    assert len(waits) == 8  # before and after each run


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    with threads(0):
        assert torch.get_num_threads() == before


def test_there_is_nothing_to_wait_for_on_a_cpu():
    waiter(torch.device("cpu"))()
