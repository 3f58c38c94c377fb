"""How figures look on a terminal: colours, sparklines, numbers with units, progress.

Colours go to terminals only, and to none that says NO_COLOR. Progress goes to standard error, as bars on a
terminal and else as a plain line now and then, so that standard output holds results alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rheostat.columns import in_parts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

RAMP = (24, 60, 102, 144, 185, 227)
"""Codes of the 256 colours, cheap to dear: dark blue to light yellow, as in cividis; lightness rises."""

BARS = "▁▂▃▄▅▆▇█"
PLAIN_WIDTH = 120
"""Columns for output that goes to a file or a pipe."""
LINE_SECONDS = 10.0
"""A stage writes plain lines at most this often."""


# -- colours


def uses_colour(stream: TextIO) -> bool:
    """Whether to write colours to this stream."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def ramp_colour(fraction: float, low: float = 0.0) -> int:
    """The colour of `fraction`, where `low` (and less) is the cheapest and 1 the dearest."""
    share = 1.0 if low >= 1 else (fraction - low) / (1 - low)
    return RAMP[min(len(RAMP) - 1, max(0, int(share * len(RAMP))))]


def luminance(colour: int) -> float:
    """Relative luminance, from 0 to 1, of one of the 216 colours of the cube (codes 16 to 231)."""
    steps = (0, 95, 135, 175, 215, 255)
    code = colour - 16
    channels = [steps[code // 36] / 255, steps[code // 6 % 6] / 255, steps[code % 6] / 255]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def paint(text: str, colour: int) -> str:
    """`text` on a ground of `colour`, in black or white, whichever reads better. Line ends stay unpainted."""
    ink = 16 if luminance(colour) > 0.18 else 231
    start, end = f"\x1b[38;5;{ink};48;5;{colour}m", "\x1b[0m"
    return "\n".join(f"{start}{line}{end}" if line else "" for line in text.split("\n"))


def printable(text: str) -> str:
    """`text` without characters that steer a terminal: what a model writes must not."""
    return "".join(c if c in "\n\t" or not _is_control(c) else "\ufffd" for c in text)


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"


def legend(low: float) -> str:
    """One line that explains the colours of `ramp_colour`."""
    return "FFN width " + f"{low:.0%} " + "".join(paint("  ", colour) for colour in RAMP) + " 100%"


def console(stream: TextIO | None = None) -> Console:
    """A console on standard output (or `stream`), wide enough for tables also when that is no terminal."""
    from rich.console import Console
    from rich.table import Table

    class Ours(Console):
        """Tables keep their numbers whole, and a reader that has gone is the error that it is to Python."""

        def print(self, *objects: Any, **options: Any) -> None:
            if len(objects) == 1 and isinstance(objects[0], Table):
                for part in in_parts(objects[0], self.width):
                    super().print(part, **options)
            else:
                super().print(*objects, **options)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1

    stream = stream or sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH
    return Ours(file=stream, highlight=False, markup=False, emoji=False, width=width)


# -- numbers


def sparkline(fractions: Sequence[float]) -> str:
    """One character for each fraction of 1; from an eighth up, each eighth is a step."""
    return "".join(BARS[min(8, max(1, round(fraction * 8))) - 1] for fraction in fractions)


def short(number: float) -> str:
    """Three digits and a prefix: 134.5 M."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """A span of time in two parts at most: 0.42 s, 12 s, 3 min 20 s, 1 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# -- progress


class Stage:
    """What is known of one stage: where it began and how far it is. `begin` again when it starts over."""

    def __init__(self, what: str, done: int, total: int, now: float) -> None:
        self.what = what
        self.first, self.done, self.total = done, done, total
        self.began = self.spoke = now
        self.is_open = False
        """Its end is not known yet: the total keeps growing."""

    def update(self, done: int, total: int) -> None:
        """Take the newest figures."""
        if done < total:
            self.is_open = self.is_open or total != self.total
        self.done, self.total = done, total

    @property
    def is_done(self) -> bool:
        """Nothing is left to do."""
        return self.done >= self.total

    def line(self, now: float) -> str:
        """Where the stage is, in words."""
        spent = now - self.began
        if self.is_done:
            return f"{self.what}: done in {duration(spent)}"
        if self.is_open:
            return f"{self.what}: {self.done} done in {duration(spent)}"
        text = f"{self.what}: {self.done}/{self.total} ({self.done / self.total:.0%})"
        if self.done > self.first:
            text += f", about {duration(spent / (self.done - self.first) * (self.total - self.done))} left"
        return text


class ProgressDisplay:
    """A `Progress`: call it with what, done, total. A stage is a bar on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream or sys.stderr
        self.clock = clock
        self.stages: dict[str, Stage] = {}
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressDisplay:
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self.bars = _bars(self.stream)
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        stage, now = self.stages.get(what), self.clock()
        if stage is None or done < stage.done or stage.is_done:
            if stage is not None and stage.is_done and done >= total:
                return  # the end, told twice
            stage = self.stages[what] = Stage(what, done, total, now)
            self.tasks.pop(what, None)
        stage.update(done, total)
        if self.bars is not None:
            self._draw(stage)
        elif stage.is_done or now - stage.spoke >= LINE_SECONDS:
            stage.spoke = now
            print(stage.line(now), file=self.stream, flush=True)

    def _draw(self, stage: Stage) -> None:
        assert self.bars is not None
        if stage.what not in self.tasks:
            self.tasks[stage.what] = self.bars.add_task(stage.what, completed=stage.done, total=stage.total)
        total = None if stage.is_open and not stage.is_done else stage.total
        self.bars.update(self.tasks[stage.what], completed=stage.done, total=total)


def _bars(stream: TextIO) -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console(stream),
    )
