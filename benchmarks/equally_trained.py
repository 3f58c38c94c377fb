"""Perplexity along the dial against a dense model that was given the same training: the baseline of a trained dial.

    rheostat adapt smollm2-135m --config recipes/cpu.yaml --out dial
    rheostat adapt smollm2-135m --config recipes/cpu_dense.yaml --out dense
    python benchmarks/equally_trained.py dial dense --data novels.txt,wiki.txt --windows 12

Ratios are paired by window, with the standard error of that. Beside each setting stand the best static widths and a
random router at the same mean compute. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

import torch

import rheostat
from rheostat.adapted import Adapted
from rheostat.eval.quality import Quality, Run, evaluate
from rheostat.meter import Meter
from rheostat.provenance import provenance
from rheostat.text import pack, read_texts


def by_window(adapted: Adapted, windows: torch.Tensor, runs: Sequence[Run], label: str) -> list[list[Quality]]:
    """Run -> its figures on each window alone; the first run is the model's own dense setting."""
    found = []
    for i, window in enumerate(windows):
        print(f"{label}: window {i + 1} of {len(windows)}", file=sys.stderr)
        found.append(evaluate(adapted, window[None], runs))
    return [list(column) for column in zip(*found, strict=True)]


def row(kind: str, asked: float, mine: list[Quality], theirs: list[Quality]) -> dict[str, float | str]:
    """One line of the table: mean perplexities, and the paired ratio with its standard error."""
    gaps = torch.tensor([a.loss - b.loss for a, b in zip(mine, theirs, strict=True)], dtype=torch.float64)
    ratio = math.exp(float(gaps.mean()))
    return {
        "kind": kind,
        "asked": asked,
        "compute": sum(q.compute for q in mine) / len(mine),
        "perplexity": math.exp(sum(q.loss for q in mine) / len(mine)),
        "ratio": ratio,
        "ratio_error": ratio * float(gaps.std()) / math.sqrt(len(gaps)),
    }


def measure(dial: Adapted, dense: Adapted, windows: torch.Tensor, computes: list[float], seed: int) -> list[dict]:
    reference = by_window(dense, windows, [], "dense")[0]
    meters: dict[str, Meter] = {}
    runs = [Run(label=f"dial {compute:g}", compute=compute) for compute in computes]
    evaluate(dial, windows, runs, meters=meters)  # for the use of experts that the baselines have to match
    rivals = []
    for compute, run in zip(computes, runs, strict=True):
        overrides = dial.method.baselines(dial.model, meters[run.label].expert_counts, seed)
        rivals += [
            (kind, Run(label=f"{kind} {compute:g}", compute=compute, override=o)) for kind, o in overrides.items()
        ]
    kinds = [("dial", run) for run in runs] + rivals
    columns = by_window(dial, windows, [run for _, run in kinds], "dial")
    rows = [row("dense", 1.0, reference, reference), row("dial", 1.0, columns[0], reference)]
    return rows + [row(k, run.compute, c, reference) for (k, run), c in zip(kinds, columns[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dial", help="an adapted model")
    parser.add_argument("dense", help="the dense model after the same training")
    parser.add_argument("--compute", default="0.9,0.8,0.7")
    parser.add_argument("--data", default="builtin:heldout", help="files of text, each measured on its own")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dial, tokenizer = rheostat.load(args.dial)
    dense, _ = rheostat.load(args.dense)
    dense = dense if isinstance(dense, Adapted) else Adapted(dense)
    computes = [float(c) for c in args.compute.split(",")]
    figures = {}
    for name in args.data.split(","):
        windows = pack(tokenizer, read_texts(name), length=args.length, limit=args.windows, seed=args.seed)
        figures[name] = rows = measure(dial, dense, windows, computes, args.seed)
        print(f"\n{name}: {len(windows)} windows of {args.length}; ratios to the equally trained dense model")
        for one in sorted(rows, key=lambda one: -float(one["asked"])):
            print(
                f"{one['asked']:<4g} {one['kind']:<7} spent {one['compute']:.3f}  "
                f"perplexity {one['perplexity']:8.2f}  ratio {one['ratio']:.3f} ± {one['ratio_error']:.3f}"
            )
    print(json.dumps({"texts": figures, "provenance": provenance(seed=args.seed)}))


if __name__ == "__main__":
    main()
