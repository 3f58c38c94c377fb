"""The second picture on KV Prediction's page: time and quality of a predicted prompt, and quality against training tokens.

    python benchmarks/trained_picture.py docs/figures/kv-prediction-trained-2026-11-21.json docs/images/kv_trained.png

The figures are those of `trained_readers.py` (its lines under `quality`) and of `predicted_prompt.py --time` (`time`).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

SIDES = {
    "predicted": ("predicted prompt: maps trained", "#0072b2", "o"),
    "first": ("first 15 layers alone, trained", "#d55e00", "s"),
    "even": ("15 layers spread evenly, alone, trained", "#009e73", "^"),
}
TEXTS = {"novels": "-", "wikitext": "--"}
NEWS = (1, 2, 16, 64)


def ratio(row: dict[str, Any], dense: dict[str, Any], text: str) -> float:
    """Of perplexities, on the windows that both have read."""
    pairs = zip(row[text], dense[text], strict=False)
    return math.exp(statistics.fmean(mine - theirs for mine, theirs in pairs))


def draw_training(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Perplexity after a prompt against training tokens."""
    dense = next(row for row in rows if row["side"] == "dense")
    for side, (label, color, marker) in SIDES.items():
        mine = sorted((row for row in rows if row["side"] == side), key=lambda row: row["tokens"])
        for text, line in TEXTS.items():
            ys = [ratio(row, dense, text) for row in mine]
            xs = [row["tokens"] / 1000 for row in mine]
            axes.plot(xs, ys, line, color=color, marker=marker, label=f"{label}, {text}")
    dropped = next(row for row in rows if row["side"] == "dropped")
    for text, line in TEXTS.items():
        axes.axhline(ratio(dropped, dense, text), color="#999999", linestyle=line, label=f"0.565 of the tokens, {text}")
    axes.set_yscale("log")
    axes.set_xlabel("training tokens [thousands]")
    axes.set_ylabel("perplexity after a prompt of 384 tokens / dense")
    axes.legend(fontsize=7)


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
    draw_training(right, figures["quality"])
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
