"""The timing core: sides take turns, a clock is read, and a median with its quartiles comes out. Knows no models.

Every side runs once in every round, one after the other, so that drift of the machine (its temperature, its
neighbours) hits all alike, and rounds can be compared in pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from rheostat.methods.base import Progress, no_progress

Clock = Callable[[], float]
"""Seconds from some beginning; never goes back."""

Trial = Callable[[], Mapping[str, float]]
"""Runs once and returns the seconds it took, by what was timed."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What several rounds say: the middle, and how far the middle half spreads."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int

    def to_dict(self) -> dict[str, float]:
        """Plain types, for JSON."""
        return asdict(self)


def summarise(values: Iterable[float]) -> Summary:
    """Median and quartiles (by interpolation between the rounds, ends included) of at least one value."""
    ordered = sorted(values)
    assert ordered, "no rounds"
    low, median, high = ordered * 3 if len(ordered) == 1 else statistics.quantiles(ordered, n=4, method="inclusive")
    return Summary(median=median, low=low, high=high, rounds=len(ordered))


def ratios(base: Sequence[float], other: Sequence[float]) -> Summary:
    """How many times as fast as `base` the other is: each round's two times are compared with each other."""
    return summarise(a / b for a, b in zip(base, other, strict=True))


def take_turns(
    trials: Mapping[str, Trial],
    *,
    rounds: int,
    warmups: int = 1,
    progress: Progress = no_progress,
    what: str = "rounds",
) -> dict[str, dict[str, list[float]]]:
    """Run all trials in turn, `warmups` rounds that are thrown away and then `rounds` that count.

    Returns:
        Trial -> what was timed -> seconds, one a round.
    """
    kept: dict[str, dict[str, list[float]]] = {name: {} for name in trials}
    steps = (warmups + rounds) * len(trials)
    for turn in range(warmups + rounds):
        for place, (name, trial) in enumerate(trials.items()):
            progress(what, turn * len(trials) + place, steps)
            seconds = trial()
            if turn >= warmups:
                for key, value in seconds.items():
                    kept[name].setdefault(key, []).append(value)
    progress(what, steps, steps)
    return kept


def fastest(action: Callable[[], object], wait: Callable[[], None], clock: Clock, repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one that warms up: what the machine can do, since whatever
    disturbs a run can only slow it."""
    best = float("inf")
    for turn in range(repeats + 1):
        wait()
        start = clock()
        action()
        wait()
        if turn:
            best = min(best, clock() - start)
    return best


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that returns once `device` has done all it was given: an accelerator answers before it is done."""
    if device.type == "cpu":
        return _nothing
    return lambda: torch.accelerator.synchronize(device)


def _nothing() -> None:
    pass


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run with this many threads inside products; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
