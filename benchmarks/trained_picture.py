"""The second picture on KV Prediction's page: time of a predicted prompt, and quality against training tokens.

    python benchmarks/trained_picture.py docs/figures/kv-prediction-trained-2026-11-21.json docs/images/kv_trained.png

The figures are those of `predicted_prompt.py --time` (`time`) and the losses that `trained_readers.py train` printed
(`losses`: tokens seen, and by side the divergence from the dense model on the next batch).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

SIDES = {
    "predicted": ("predicted prompt: maps trained (all terms of its loss)", "#0072b2", "o"),
    "first": ("first 15 layers alone, trained", "#d55e00", "s"),
    "even": ("15 layers spread evenly, alone, trained", "#009e73", "^"),
}
NEWS = (1, 2, 16, 64)


def draw_training(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Divergence from the dense model, on text not yet trained on, against training tokens."""
    for side, (label, color, marker) in SIDES.items():
        xs = [row["tokens"] / 1000 for row in rows]
        axes.plot(xs, [row[side] for row in rows], color=color, marker=marker, markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("training tokens seen before [thousands]")
    axes.set_ylabel("nats from the dense model, on the next batch")
    axes.set_ylim(top=40)  # room for the legend
    axes.legend(fontsize=8)


def draw_times(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Seconds to the first token and to several: stock, our runtime, a predicted prompt."""
    found = {(row["side"], row["new"]): row for row in rows}
    sides = [("stock transformers, bfloat16", "stock_ms", "all layers", "#999999")]
    sides += [("our runtime, all layers", "ms", "all layers", "#56b4e9"), ("k = 15", "ms", "depth 15", "#0072b2")]
    for place, (label, field, side, color) in enumerate(sides):
        times = [found[side, new][field] for new in NEWS]
        spread = [[one[0] - one[1] for one in times], [one[2] - one[0] for one in times]]
        at = [index + 0.27 * (place - 1) for index in range(len(NEWS))]
        axes.bar(at, [one[0] for one in times], 0.26, yerr=spread, capsize=2, color=color, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(NEWS)), [str(new) for new in NEWS])
    axes.set_xlabel(f"tokens written after a prompt of {rows[0]['prompt']}")
    axes.set_ylabel("milliseconds in all, median and quartiles")
    axes.legend(fontsize=7)


def main(source: str, target: str) -> None:
    """Both panels."""
    figures = json.loads(Path(source).read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), constrained_layout=True)
    draw_times(left, figures["time"])
    draw_training(right, figures["losses"])
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
