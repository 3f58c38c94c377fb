"""The second picture on KV Prediction's page: quality at the time to the first token, and against training tokens.

    python benchmarks/trained_picture.py docs/figures/kv-prediction-2026-11-22.json docs/images/kv_trained.png

Left: what `predicted_answers.py --dropped` printed (`depths`) and the last stops of `trained_readers.py measure`
(`curve`), at the times of `predicted_prompt.py --beside` (`time`). Right: all stops.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

SIDES = {
    "predicted": ("predicted prompt, k = 15", "#0072b2", "o"),
    "first": ("first 15 layers alone, trained", "#d55e00", "s"),
    "even": ("15 even layers alone, trained", "#009e73", "^"),
    "dropped": ("random share of the tokens", "#999999", "v"),
}
TEXTS = {"novels": "--", "wikitext": "-"}
PROMPT = 512


def draw_matched(axes: Any, figures: dict[str, Any]) -> None:
    """Nats a token after a prompt against the measured time to the first token."""
    times = {row["side"]: row["ms"] for row in figures["time"] if row["prompt"] == PROMPT}
    depths = sorted(int(side.split()[1]) for side in times if side.startswith("depth"))
    found = {(row["task"], row["side"]): row["more"] for row in figures["depths"]["rows"] if "ratio" in row}
    for text, style in TEXTS.items():
        for side, named, label in (
            ("predicted", "maps, k = {}, 1 exact", "depth {}"),
            ("dropped", "dropped, k = {}", "dropped {}"),
        ):
            points = [(times[label.format(k)][0], found[text, named.format(k)]) for k in depths]
            _, color, marker = SIDES[side]
            axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, markersize=5)
            if text == "wikitext":
                for (x, y), k in zip(points, depths, strict=True):
                    name = f"k = {k}" if side == "predicted" else ""
                    axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
        for side in ("first", "even"):
            _, color, marker = SIDES[side]
            spot = (times[f"{side} 15"][0], stops(figures, side, text)[-1][1])
            axes.plot(*spot, color=color, marker=marker, markersize=7, fillstyle="full" if style == "-" else "none")
    axes.axvline(times["all layers"][0], color="k", linestyle=":", linewidth=1)
    axes.annotate("all layers (0 nats)", (times["all layers"][0], 0.1), rotation=90, ha="right", fontsize=7)
    axes.set_xlabel(f"time to the first token, {PROMPT} tokens of prompt [ms], our runtime")


def stops(figures: dict[str, Any], side: str, text: str) -> list[tuple[int, float]]:
    """Training tokens and nats a token above the dense model, of one side."""
    rows = {(row["side"], row["tokens"]): row[text] for row in figures["curve"]}
    dense = rows["dense", 0]
    tokens = sorted(count for name, count in rows if name == side)
    gaps = [[a - b for a, b in zip(rows[side, count], dense, strict=True)] for count in tokens]
    return [(count, sum(gap) / len(gap)) for count, gap in zip(tokens, gaps, strict=True)]


def draw_training(axes: Any, figures: dict[str, Any]) -> None:
    """The same against training tokens."""
    for side, (label, color, marker) in SIDES.items():
        for text, style in TEXTS.items():
            found = stops(figures, side, text)
            name = f"{label}, {'WikiText-2' if text == 'wikitext' else text}"
            if len(found) == 1:  # nothing to train
                axes.axhline(found[0][1], color=color, linestyle=style, label=name, linewidth=1)
                continue
            xs, ys = zip(*found, strict=True)
            axes.plot([x / 1000 for x in xs], ys, style, color=color, marker=marker, markersize=5, label=name)
    axes.set_xlabel("training tokens [thousands]")
    axes.legend(fontsize=7, loc="lower left", handlelength=3.2)


def main(source: str, target: str) -> None:
    """Both panels, on one scale."""
    figures = json.loads(Path(source).read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True, sharey=True)
    draw_matched(left, figures)
    draw_training(right, figures)
    left.set_ylabel("nats a token above dense, after a prompt")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
