"""The picture of a report: quality against compute spent, one panel for each text."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from rheostat.report import write_whole

BLACK, GREY = "#000000", "#7f7f7f"
DIAL_COLOUR = "#0072B2"
RIVAL_STYLES = (("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))
"""Colour (Okabe and Ito's) and marker of each baseline, in order."""
PANEL_INCHES = (5.2, 4.2)
TICKS = (1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
MIN_GAP = 0.1
"""Between two ticks, as a share of the axis."""
ROOM = 0.08
"""Free space above the highest and below the lowest point, as a share of the axis (which is a logarithm)."""


def pareto(report: Mapping[str, Any], path: Path) -> None:
    """Draw the report of `rheostat eval` and write it to `path` as PNG.

    Args:
        report: `model`, `method` and `texts`, each text with `name` and `runs` (rows with `kind`, `compute`,
            `ratio` and `ratio_error`).

    Raises:
        SettingError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = report["texts"]
    width, height = PANEL_INCHES
    # A figure of its own, because pyplot would keep a global state, and look for a screen.
    figure = Figure(figsize=(width * len(texts), height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for panel, text in zip(panels, texts, strict=True):
        _draw(panel, text["runs"], report["method"]["name"])
        panel.set_title(text["name"], fontsize=10)
    panels[0].set_ylabel("perplexity relative to dense (log scale)")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{Path(report['model']).name}: quality against compute", fontsize=12, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def ticks(low: float, high: float) -> list[float]:
    """Round ratios between `low` and `high` for a logarithmic axis, none too close to the one below it."""
    chosen: list[float] = []
    for tick in TICKS:
        if low <= tick <= high and (not chosen or tick / chosen[-1] > (high / low) ** MIN_GAP):
            chosen.append(float(tick))
    return chosen or [low, high]


def _draw(panel: Any, runs: list[dict[str, Any]], method: str) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for run in runs:  # in their order, so that a kind has the same colour in every panel
        by_kind.setdefault(run["kind"], []).append(run)
    dense = by_kind.pop("dense")
    dials = by_kind.pop("dial", [])
    for (kind, rivals), (colour, marker) in zip(by_kind.items(), cycle(RIVAL_STYLES), strict=False):
        _line(panel, rivals, kind, color=colour, marker=marker, linestyle="--", linewidth=1.2, markersize=5)
    if dials:
        label = f"{method}, by token"
        style = {"color": DIAL_COLOUR, "marker": "o", "linewidth": 2, "markersize": 6, "zorder": 3}
        _line(panel, [*dense, *dials], label, **style)
    x, y = [run["compute"] for run in dense], [run["ratio"] for run in dense]
    panel.plot(x, y, label="dense", color=BLACK, marker="*", markersize=13, linestyle="none", zorder=4)
    _axes(panel, runs)


def _line(panel: Any, runs: list[dict[str, Any]], label: str, **style: Any) -> None:
    runs = sorted(runs, key=lambda run: -run["compute"])
    x, y = [run["compute"] for run in runs], [run["ratio"] for run in runs]
    errors = [run["ratio_error"] for run in runs]
    panel.errorbar(x, y, yerr=errors, label=label, capsize=2.5, elinewidth=1, **style)


def _axes(panel: Any, runs: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    low = min(run["ratio"] - run["ratio_error"] for run in runs)
    high = max(max(run["ratio"] + run["ratio_error"] for run in runs), low * 1.01)
    room = (high / low) ** ROOM
    panel.set_yscale("log")
    panel.set_ylim(low / room, high * room)
    panel.yaxis.set_major_locator(FixedLocator(ticks(low / room, high * room)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    panel.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    panel.set_xlabel("compute spent (% of the dense model's FLOPs)")
    panel.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
