"""The picture on KV Prediction's page, from figures that `predicted_prompt.py` printed.

python benchmarks/predicted_picture.py docs/figures/kv-prediction-2026-11-21.json docs/images/kv_prediction.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

STYLES = {"novels": ("#0072b2", "o"), "wikitext": ("#d55e00", "s")}
PROMPT = 512


def main(source: str, target: str) -> None:
    """Perplexity after a prompt against the time to the first token."""
    figures = json.loads(Path(source).read_text())
    rows = [row for row in figures["time"] if (row["prompt"], row["new"]) == (PROMPT, 1)]
    times = {row["side"].removeprefix("depth "): row["ms"] for row in rows}
    figure, axes = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    for name, (color, marker) in STYLES.items():
        found = {row["reader"]: row["ratio"] for row in figures["quality"][name]}
        points = [(times["all layers"], 1.0, "all layers")]
        timed = [depth for depth in times if f"predicted {depth}" in found]
        points += [(times[depth], found[f"predicted {depth}"], f"k = {depth}") for depth in timed]
        xs, ys = [one[0][0] for one in points], [one[1] for one in points]
        spread = [[one[0][0] - one[0][1] for one in points], [one[0][2] - one[0][0] for one in points]]
        axes.errorbar(xs, ys, xerr=spread, color=color, marker=marker, capsize=3, label=f"predicted prompt, {name}")
        for x, y, label in zip(xs, ys, (one[2] for one in points), strict=True):
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        if dropped := found.get("dropped 15"):
            axes.axhline(dropped, color=color, linestyle=":", label=f"0.545 of the tokens, {name} (not timed)")
    stock = rows[0]["stock_ms"][0]
    axes.axvline(stock, color="#666666", linestyle="--", label="stock transformers, bfloat16")
    axes.set_xlabel(f"time to the first token, {PROMPT} tokens of prompt [ms], median and quartiles")
    axes.set_ylabel("perplexity after a prompt of 384 tokens / dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
