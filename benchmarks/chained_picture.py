"""The picture of a chain on KV Prediction's page, from what `chained.py` printed (`chain` in the figures).

python benchmarks/chained_picture.py docs/figures/kv-prediction-2026-11-22.json docs/images/kv_chain.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

SIDES = {
    "chain": ("both on one dial", "#0072b2", "o"),
    "dynamoe": ("DynaMoE alone", "#d55e00", "s"),
    "kv_prediction": ("KV Prediction alone", "#009e73", "^"),
}
TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 4, 5)
TEXTS = {"novels": "novels", "wikitext": "WikiText-2"}


def draw_path(axes: Any, dials: dict[str, Any]) -> None:
    """Divergence from the dense model along each dial, as it was calibrated."""
    for side, (label, color, marker) in SIDES.items():
        dial = dials[side]
        axes.plot(dial["compute"], dial["measured_on"]["divergence"], color=color, marker=marker, label=label)
    chain = dials["chain"]
    points = zip(
        chain["compute"],
        chain["measured_on"]["divergence"],
        chain["settings"]["kv_prediction"],
        chain["settings"]["dynamoe"],
        strict=True,
    )
    for compute, apart, layers, price in points:
        axes.annotate(
            f"{layers:.0f}, {price:.2g}", (compute, apart), textcoords="offset points", xytext=(4, -9), fontsize=7
        )
    axes.set_xlim(0.25, 1.03)  # room for the last point's label; turned round with the others
    axes.set_title("the dial: layers predicted, DynaMoE's setting", fontsize=9)
    axes.set_ylabel("nats from the dense model's next words")


def draw_quality(axes: Any, rows: list[dict[str, Any]], text: str) -> None:
    """Perplexity of one text's answers against what was spent."""
    for side, (label, color, marker) in SIDES.items():
        found = sorted((row["spent"], row["ratio"], row["ratio_error"]) for row in rows if row["side"] == side)
        xs, ys, errors = zip((1.0, 1.0, 0.0), *found[::-1], strict=True)
        axes.errorbar(xs, ys, yerr=errors, color=color, marker=marker, markersize=5, capsize=2, label=label)
    axes.set_yscale("log")
    top = max(row["ratio"] for row in rows)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick <= top * 1.1]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(f"128 tokens after 384, {TEXTS[text]}", fontsize=9)
    axes.set_ylabel("perplexity / dense")


def main(source: str, target: str) -> None:
    """Three panels."""
    figures = json.loads(Path(source).read_text())["chain"]
    figure, panels = plt.subplots(1, 1 + len(TEXTS), figsize=(12, 4), constrained_layout=True)
    draw_path(panels[0], figures["dials"])
    for axes, text in zip(panels[1:], TEXTS, strict=True):
        draw_quality(axes, figures["quality"][text], text)
    for axes in panels:
        axes.invert_xaxis()
        axes.set_xlabel("compute spent on prompt and answer")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
