"""What a terminal shows, and what a file gets instead."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rheostat import terminal
from rheostat.terminal import ProgressDisplay


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# -- colours


def test_lightness_rises_along_the_ramp():
    lights = [terminal.luminance(colour) for colour in terminal.RAMP]
    assert lights == sorted(lights)
    assert all(b - a > 0.01 for a, b in pairwise(lights))


def test_text_can_be_read_on_every_colour():
    for colour in terminal.RAMP:
        ink = 0.0 if "38;5;16;" in terminal.paint("x", colour) else 1.0
        low, high = sorted([ink, terminal.luminance(colour)])
        assert (high + 0.05) / (low + 0.05) >= 4.5  # the usual threshold for text


def test_ramp_ends():
    assert terminal.ramp_colour(1.0, 0.25) == terminal.RAMP[-1]
    assert terminal.ramp_colour(0.25, 0.25) == terminal.ramp_colour(0.0, 0.25) == terminal.RAMP[0]
    assert terminal.ramp_colour(1.0, 1.0) == terminal.RAMP[-1]


def test_paint_leaves_line_ends_alone():
    painted = terminal.paint("a\n\nb", 227)
    assert [line.count("\x1b[0m") for line in painted.split("\n")] == [1, 0, 1]
    assert painted.endswith("\x1b[0m")


def test_colour_only_where_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert terminal.uses_colour(Screen())
    assert not terminal.uses_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.uses_colour(Screen())


def test_a_model_cannot_steer_the_terminal():
    assert terminal.printable("a\x1b[2J\rb\n\tc\x9b") == "a\ufffd[2J\ufffdb\n\tc\ufffd"


# -- numbers


def test_sparkline():
    assert terminal.sparkline([0, 0.25, 0.5, 0.75, 1, 1.2]) == "▁▂▄▆██"


@given(st.lists(st.floats(0, 1), min_size=2))
def test_sparkline_keeps_the_order(values: list[float]):
    line = terminal.sparkline(sorted(values))
    assert list(line) == sorted(line)
    assert len(line) == len(values)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.9, "1 k"), (134_515_008, "135 M"), (2.69e8, "269 M"), (1e12, "1 T")],
)
def test_short(number: float, text: str):
    assert terminal.short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42 s"),
        (9.97, "10 s"),
        (12, "12 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3900, "1 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str):
    assert terminal.duration(seconds) == text


# -- progress


def test_plain_lines_come_now_and_then():
    stream, clock = io.StringIO(), Clock()
    with ProgressDisplay(stream, clock) as progress:
        for step in range(26):
            clock.now = float(step)
            progress("solving", step, 25)
            progress("solving", step, 25)
    assert stream.getvalue().splitlines() == [
        "solving: 10/25 (40%), about 15 s left",
        "solving: 20/25 (80%), about 5 s left",
        "solving: done in 25 s",
    ]


def test_a_growing_total_promises_nothing():
    stream, clock = io.StringIO(), Clock()
    with ProgressDisplay(stream, clock) as progress:
        for step in range(4):
            clock.now = 6.0 * step
            progress("measuring", step, step + 1)
        progress("measuring", 4, 4)
    assert stream.getvalue().splitlines() == ["measuring: 2 done in 12 s", "measuring: done in 18 s"]


def test_a_stage_may_start_again_and_resume():
    stream, clock = io.StringIO(), Clock()
    with ProgressDisplay(stream, clock) as progress:
        progress("measuring", 1, 1)
        clock.now = 50
        progress("measuring", 80, 100)  # as after a checkpoint: the first 80 took no time here
        clock.now = 60
        progress("measuring", 90, 100)
    assert stream.getvalue().splitlines()[1:] == ["measuring: 90/100 (90%), about 10 s left"]


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Screen()
    with ProgressDisplay(stream) as progress:
        progress("solving", 0, 2)
        progress("growing", 0, 1)
        progress("growing", 1, 2)
        progress("growing", 2, 2)
        progress("solving", 2, 2)
    text = stream.getvalue()
    assert "solving" in text
    assert "2/2" in text
    assert "\x1b[" in text


def test_nothing_but_text_off_a_terminal():
    stream = io.StringIO()
    with ProgressDisplay(stream) as progress:
        progress("solving", 2, 2)
    assert stream.getvalue().isascii()
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
