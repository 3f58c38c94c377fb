"""The pictures of `serve_load.py` and `serve_adaptive.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

NAMES = {
    "rheostat:int8": ("rheostat serve, mixed dials (int8)", "#0b6e4f"),
    "rheostat:bfloat16": ("rheostat serve, mixed dials (bf16)", "#4fa98c"),
    "rheostat:float32": ("rheostat serve, mixed dials (fp32)", "#9ad1bd"),
    "llama.cpp": ("llama_cpp.server (Q4_1)", "#c1666b"),
    "continuous:bfloat16": ("transformers serve --continuous-batching (bf16)", "#4059ad"),
    "continuous:float32": ("transformers serve --continuous-batching (fp32)", "#97a7d9"),
    "transformers:bfloat16": ("transformers serve (bf16)", "#8a8a8a"),
}


def draw_load(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput and time to first token against clients, a line for each server."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for side, (name, colour) in NAMES.items():
        mine = sorted((row["clients"], row) for row in rows if row["side"] == side)
        if mine:
            clients = [one for one, _ in mine]
            left.plot(clients, [row["tokens_per_second"] for _, row in mine], "o-", color=colour, label=name)
            right.plot(clients, [row["first_token_ms"]["p95"] / 1e3 for _, row in mine], "o-", color=colour)
    for axes, label in ((left, "tokens a second"), (right, "time to first token, p95, s")):
        _dress(axes, "clients", label)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["clients"] for row in rows})
        axes.set_xticks(ticks, [str(one) for one in ticks])
    right.set_yscale("log")
    left.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def draw_adaptive(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each request's wait for its first token against when it came, a panel for each server and load."""
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    size = (2.9 * columns, 2.9 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes in grid.flat[len(rows) :]:
        axes.axis("off")
    for place, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
        for status, colour, label in ((200, "#0b6e4f", "answered"), (-1, "#c1666b", "not done at the end")):
            points = [(at, seconds) for at, seconds, found in row["points"] if found == status]
            if points:
                axes.scatter(*zip(*points, strict=True), s=6, color=colour, label=label)
        server, _, factor = row["cell"].partition("@")
        name, _, least = server.partition(":")
        reach = f", down to {least}" if least else ""
        told = f"{row['answers_per_second']:.1f} answers/s, {row['refused']} refused, compute {row['spent']:.2f}"
        axes.set_title(f"{factor} times the load\n{SERVERS[name]}{reach}\n{told}", fontsize=7.5)
        is_left, is_low = place % columns == 0, place + columns >= len(rows)
        _dress(axes, "came at, s" if is_low else "", "time to first token, s" if is_left else "")
    grid[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


SERVERS = {
    "fixed": "fixed dial",
    "adaptive": "adaptive dial",
    "fixed+bound": "fixed, bounded wait",
    "adaptive+bound": "adaptive, bounded wait",
}


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
