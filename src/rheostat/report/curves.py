"""Quality against what it costs: FLOPs, bytes, milliseconds. One panel for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from rheostat.report.schema import Bench, Report, Run, Task, Text, kind_of
from rheostat.report.style import (
    DIAL_STYLE,
    FRONT_STYLE,
    INK,
    PANEL_INCHES,
    QUIET,
    RIVAL_STYLES,
    SERIES_STYLES,
    grid,
    legend_below,
    plain_axes,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TICKS = (1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
MIN_GAP = 0.1
"""Between two ticks, as a share of the axis."""
ROOM = 0.08
"""Free space above the highest and below the lowest point, as a share of the axis (which is a logarithm)."""
SAME_COST = 0.01
"""Relative difference below which two costs are taken for equal."""
RATIO_LABEL = "perplexity / dense (log scale)"


@dataclass(frozen=True)
class Point:
    """Something measured: what it cost (with the ends of its error bar), and its quality."""

    x: float
    y: float
    y_error: float = 0.0
    x_low: float | None = None
    x_high: float | None = None


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: the key of a run it shows, divided by `unit`."""

    key: str
    label: str
    unit: float = 1.0
    is_share: bool = False


FLOPS = Axis("compute", "FLOPs in products with weights (% of dense)", is_share=True)
BYTES = Axis("bytes_per_token", "bytes to decode one token (MB, counted from sizes)", unit=1e6)


def against(texts: Sequence[Text], method: str, axis: Axis) -> Figure:
    """Perplexity ratio of every run against `axis`, baselines and Pareto front included."""
    figure, panels = grid(len(texts), PANEL_INCHES, extra=0.45)
    for i, (panel, text) in enumerate(zip(panels, texts, strict=True)):
        draw_runs(panel, text["runs"], method, axis)
        panel.set_title(shorten(text["name"]))
        if i % 2 == 0:
            panel.set_ylabel(RATIO_LABEL)
    legend_below(figure, panels, columns=5 if len(texts) > 1 else 3)
    return figure


def draw_runs(panel: Any, runs: Sequence[Run], method: str, axis: Axis) -> None:
    """One text's runs on one panel."""
    by_kind: dict[str, list[Point]] = {}
    for run in runs:  # in their order, so that a kind has the same colour in every panel
        if (point := point_of(run, axis)) is not None:
            by_kind.setdefault(run["kind"], []).append(point)
    everything = [point for points in by_kind.values() for point in points]
    draw_front(panel, everything)
    dense = by_kind.pop("dense", [])
    dials = by_kind.pop("dial", [])
    star(panel, dense)
    if dials:
        draw_line(panel, [*dense, *dials], shorten(f"{method}, by token"), DIAL_STYLE)
    for (kind, rivals), (colour, marker) in zip(by_kind.items(), cycle(RIVAL_STYLES), strict=False):
        style = {"color": colour, "marker": marker, "linestyle": "--", "linewidth": 1.3, "markersize": 5.5}
        draw_line(panel, rivals, shorten(kind), style)
    ratio_axis(panel, everything)
    cost_axis(panel, axis)


def point_of(run: Run, axis: Axis) -> Point | None:
    """A run as a point, or None where a figure is missing."""
    x, ratio = run.get(axis.key), run["ratio"]
    if not isinstance(x, int | float) or ratio is None:
        return None
    return Point(x / axis.unit, ratio, run["ratio_error"] or 0.0)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in quality at the same cost or less; cheapest first.

    Costs that differ by less than `SAME_COST` count as the same: a baseline is matched to the dial's cost only as well
    as whole channels allow, and must not win by the rest.
    """
    best = [p for p in points if not any(_beats(q, p) for q in points)]
    return sorted(best, key=lambda p: (p.x, p.y))


def _beats(one: Point, other: Point) -> bool:
    """Whether nobody would choose `other` who can have `one`."""
    is_better = one.y < other.y and one.x <= other.x * (1 + SAME_COST)
    return is_better or (one.y == other.y and one.x < other.x)


def star(panel: Any, dense: Sequence[Point]) -> None:
    """The dense model."""
    x, y = [p.x for p in dense], [p.y for p in dense]
    panel.plot(x, y, label="dense", color=INK, marker="*", markersize=13, linestyle="none", zorder=4)


def draw_front(panel: Any, points: Sequence[Point]) -> None:
    """A broad band under the points that are worth choosing."""
    best = front(points)
    if len(best) > 1:
        panel.plot([p.x for p in best], [p.y for p in best], label="Pareto front", **FRONT_STYLE)


def draw_line(panel: Any, points: Sequence[Point], label: str, style: Mapping[str, Any]) -> None:
    """A series with its error bars: one standard error up and down, quartiles left and right."""
    points = sorted(points, key=lambda p: -p.x)
    across = None
    if any(p.x_low is not None for p in points):
        across = [
            [max(0.0, p.x - (p.x if p.x_low is None else p.x_low)) for p in points],
            [max(0.0, (p.x if p.x_high is None else p.x_high) - p.x) for p in points],
        ]
    panel.errorbar(
        [p.x for p in points],
        [p.y for p in points],
        xerr=across,
        yerr=[p.y_error for p in points],
        label=label,
        capsize=2.5,
        elinewidth=1,
        **style,
    )


def ticks(low: float, high: float) -> list[float]:
    """Round ratios between `low` and `high` for a logarithmic axis, none too close to the one below it."""
    chosen: list[float] = []
    for tick in TICKS:
        if low <= tick <= high and (not chosen or tick / chosen[-1] > (high / low) ** MIN_GAP):
            chosen.append(float(tick))
    return chosen or [low, high]


def ratio_axis(panel: Any, points: Sequence[Point]) -> None:
    """The vertical axis: perplexity as a ratio to dense, on a logarithmic scale."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low = min((max(p.y - p.y_error, p.y / 2) for p in points), default=1.0)
    high = max(max((p.y + p.y_error for p in points), default=1.0), low * 1.01)
    room = (high / low) ** ROOM
    panel.set_yscale("log")
    panel.set_ylim(low / room, high * room)
    panel.yaxis.set_major_locator(FixedLocator(ticks(low / room, high * room)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    panel.axhline(1, color=QUIET, linewidth=0.8, zorder=1)
    plain_axes(panel)


def cost_axis(panel: Any, axis: Axis, num_ticks: int = 7) -> None:
    """The horizontal axis."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panel.xaxis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10]))
    if axis.is_share:
        panel.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    panel.set_xlabel(axis.label)


# -- milliseconds


CLOCKS = {"tpot_ms": "time for each decoded token (ms)", "ttft_ms": "time to the first token (ms)"}


def clocks(report: Report) -> list[str]:
    """The keys of `bench` that hold times."""
    return [key for key in CLOCKS if any(spread(one.get(key)) for one in report.get("bench", []))]


def against_milliseconds(report: Report, texts: Sequence[Text], key: str) -> Figure:
    """Perplexity ratio against measured time, one line for each side that was timed."""
    figure, panels = grid(len(texts), PANEL_INCHES, extra=0.45)
    for i, (panel, text) in enumerate(zip(panels, texts, strict=True)):
        sides = timed(report.get("bench", []), text["runs"], key)
        points = [point for side in sides.values() for point in side]
        draw_front(panel, points)
        if "dial" in sides:  # looks as it does in the other pictures
            draw_line(panel, sides.pop("dial"), "dial", DIAL_STYLE)
        for (side, line), (colour, marker) in zip(sides.items(), cycle(RIVAL_STYLES), strict=False):
            style = {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 6}
            draw_line(panel, line, shorten(side), style)
        ratio_axis(panel, points)
        cost_axis(panel, Axis(key, CLOCKS[key]))
        panel.set_title(shorten(text["name"]))
        if i % 2 == 0:
            panel.set_ylabel(RATIO_LABEL)
    legend_below(figure, panels)
    return figure


def timed(bench: Sequence[Bench], runs: Sequence[Run], key: str) -> dict[str, list[Point]]:
    """Side -> points: the time of each row of `bench` beside the quality of the run at the same `compute`."""
    quality = {run["asked"]: run for run in runs if run["kind"] in ("dense", "dial")}
    sides: dict[str, list[Point]] = {}
    for one in bench:
        run, time = quality.get(1.0 if one["compute"] is None else one["compute"]), spread(one.get(key))
        if run is None or time is None or run["ratio"] is None:
            continue
        low, median, high = time
        point = Point(median, run["ratio"], run["ratio_error"] or 0.0, low, high)
        sides.setdefault(series_name(one), []).append(point)
    return sides


def series_name(one: Bench) -> str:
    """The side without the setting that may stand at its end: `dial 0.7` is a point of `dial`."""
    words = one["side"].split()
    return " ".join(words[:-1]) if len(words) > 1 and _is_number(words[-1]) else one["side"]


def spread(value: Any) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile; a number alone is all three."""
    if value is None:
        return None
    return (value["low"], value["median"], value["high"]) if isinstance(value, dict) else (value, value, value)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# -- tasks


def task_names(tasks: Sequence[Task]) -> list[str]:
    """Titles of the panels: every task with each of its metrics."""
    return list(dict.fromkeys(_task_name(task) for task in tasks if task["score"] is not None))


def _task_name(task: Task) -> str:
    return f"{task['task']}: {task['metric']}"


def against_tasks(tasks: Sequence[Task], names: Sequence[str]) -> Figure:
    """Score against `compute` asked for, one panel for each of `names`, one line for each mode. Baselines are left
    to the tables."""
    tasks = [task for task in tasks if kind_of(task) in ("dense", "dial")]
    modes = list(dict.fromkeys(task.get("mode", "score") for task in tasks))
    columns = 3 if len(names) > 2 and len(names) != 4 else 2
    size = (PANEL_INCHES[0] * 2 / columns, 2.8)
    figure, panels = grid(len(names), size, columns, extra=0.4 if len(modes) > 1 else 0)
    for i, (panel, name) in enumerate(zip(panels, names, strict=True)):
        for mode, (colour, marker) in zip(modes, cycle(SERIES_STYLES), strict=False):
            mine = [task for task in tasks if _task_name(task) == name and task.get("mode", "score") == mode]
            points = [Point(t["compute"], t["score"], t.get("stderr") or 0.0) for t in mine if t["score"] is not None]
            style = {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 6}
            if points:
                draw_line(panel, points, shorten(mode), style)
        panel.set_title(shorten(name))
        if i % columns == 0:
            panel.set_ylabel("score")
        plain_axes(panel)
        cost_axis(panel, Axis("compute", "compute asked for (% of dense)", is_share=True), num_ticks=5)
    if len(modes) > 1:
        legend_below(figure, panels)
    return figure
