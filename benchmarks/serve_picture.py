"""The pictures of `serve_load.py` and `serve_adaptive.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

NAMES = {
    "rheostat:int8": "rheostat serve, mixed dials (int8)",
    "dense:int8": "rheostat serve, compute 1 (int8)",
    "rheostat:float32": "rheostat serve, mixed dials (fp32)",
    "llama.cpp": "llama_cpp.server (Q4_1)",
    "continuous:float32": "transformers serve --continuous-batching (fp32)",
    "transformers:bfloat16": "transformers serve (bf16)",
}
COLOURS = ("#0b6e4f", "#5fb49c", "#9ad1bd", "#c1666b", "#4059ad", "#97a7d9")


def draw_load(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput and time to first token against clients, a line for each server."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (side, name), colour in zip(NAMES.items(), COLOURS, strict=True):
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


def draw_adaptive(figures: dict[str, Any], path: Path) -> None:
    """Each request's wait for its first token against when it came, a panel for each server."""
    modes = figures["modes"]
    figure, panels = plt.subplots(1, len(modes), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axes, (name, mode) in zip(panels, modes.items(), strict=True):
        for status, colour, label in ((200, "#0b6e4f", "answered"), (-1, "#c1666b", "not done at the end")):
            points = [(at, seconds) for at, seconds, found in mode["points"] if found == status]
            if points:
                axes.scatter(*zip(*points, strict=True), s=7, color=colour, label=label)
        told = f"{mode['answers_per_second']:.1f} answers/s, {mode['refused']} refused, compute {mode['spent']:.2f}"
        axes.set_title(f"{name}\n{told}", fontsize=8)
        _dress(axes, "came at, s", "time to first token, s" if axes is panels[0] else "")
    panels[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
