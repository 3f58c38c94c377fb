"""The load-adaptive dial: under pressure the server writes cheaper, within what each request allows. Pure numbers.

Pressure is how long the head of the queue has waited, against a target. Above the target the dial goes down a step at
a time, below half of it back up, slower: so that it neither swings nor lingers.
"""

from __future__ import annotations

from dataclasses import dataclass

from rheostat.errors import bad_setting

DOWN, UP = 0.25, 0.05
"""How far the level moves at one look; it falls fast, because a queue grows fast."""

EVERY = 0.25
"""Seconds between two looks."""


@dataclass
class Adaptive:
    """How far down the dial is: a level from 0 (as asked) to 1 (as low as each request allows)."""

    target: float = 1.0
    """Seconds that a request may wait before the dial moves."""
    level: float = 0.0
    _looked: float = float("-inf")

    def __post_init__(self) -> None:
        if not self.target > 0:
            raise bad_setting("adaptive_target", self.target, "a number of seconds above 0")

    def look(self, now: float, longest_wait: float) -> float:
        """Take note of the queue at the time `now`; returns the level."""
        if now - self._looked >= EVERY:
            self._looked = now
            if longest_wait > self.target:
                self.level = min(1.0, self.level + DOWN)
            elif longest_wait < self.target / 2:
                self.level = max(0.0, self.level - UP)
        return self.level


def lowered(asked: float, least: float | None, level: float, low: float) -> float:
    """The `compute` to run at: `asked`, down to `least` at level 1; `low` is where the model's dial ends.

    A request that names no least is not lowered."""
    if least is None or level <= 0:
        return asked
    return asked - level * max(0.0, asked - max(least, low))
