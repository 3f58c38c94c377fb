"""Benchmark tasks after a predicted prompt, beside what could be had for as much or less.

    python benchmarks/predicted_tasks.py smol-kvp --tasks lambada_openai,nq_oracle --task-data data --limit 60

Contexts are read by each side in its own way, and answers scored or written from what that left in the cache. Sides:
the dense model, the predicted prompt at each depth, and the readers of `prompt_readers`. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from prompt_readers import Dropping, even_layers, first_layers, fitted_layers

import rheostat
from rheostat.adapted import Adapted
from rheostat.eval.benchmarks import TaskRun, evaluate_tasks
from rheostat.provenance import provenance
from rheostat.text import pack, read_texts


def others(
    adapted: Adapted, tokenizer: Any, depths: dict[float, int], wanted: set[str], seed: int
) -> Iterator[tuple[str, float, Adapted]]:
    """Name, share of the prompt's compute, and model; `adapted` itself is of no use afterwards."""
    model, num_layers = adapted.model, adapted.geometry.num_layers
    if "fitted" in wanted:
        windows = pack(tokenizer, read_texts("builtin:calibration"), length=512, limit=32, seed=seed)
        for depth, small in fitted_layers(model, depths.values(), windows).items():
            yield f"fitted {depth}", depth / num_layers, Adapted(small)
    for name, make in (("auxiliary", first_layers), ("pruned", even_layers)):
        for depth in depths.values() if name in wanted else ():
            yield f"{name} {depth}", depth / num_layers, Adapted(make(model, depth))
    if "dropped" in wanted:
        plain = adapted.detach()
        for compute, depth in depths.items():
            one = Adapted(plain, Dropping(share=compute, seed=seed))
            yield f"dropped {depth}", compute, one
            one.detach()


def show(name: str, share: float, run: TaskRun) -> dict[str, Any]:
    """One row, printed."""
    scores = {key: (round(one.score, 4), one.score_error) for key, one in run.metrics.items()}
    row = {"side": name, "prompt_compute": round(share, 4), "task": run.task, "rows": run.num_rows, "mode": run.mode}
    row |= {"spent": round(run.compute, 4), "scores": scores, "seconds": round(run.seconds, 1)}
    print(row, flush=True)
    return row


def main(given: list[str]) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--task-data", required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--depths", default="", help="of the dial's, separated by commas (default: all)")
    parser.add_argument("--sides", default="fitted,auxiliary,pruned,dropped", help="beside dense and predicted")
    parser.add_argument("--run-code", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args(given)
    adapted, tokenizer = rheostat.load(args.artifact, dtype=getattr(torch, args.dtype))
    dial = zip(adapted.dial.compute[1:], adapted.dial.settings["kv_prediction"][1:], strict=True)
    depths = {compute: adapted.geometry.num_layers - int(setting) for compute, setting in dial}
    if args.depths:
        depths = {c: d for c, d in depths.items() if d in {int(one) for one in args.depths.split(",")}}
    names, digest = args.tasks.split(","), adapted.report.get("base_digest")
    rows = []

    def ask(model: Adapted, computes: list[float]) -> list[TaskRun]:
        options = {"folder": args.task_data, "limit": args.limit, "seed": args.seed, "run_code": args.run_code}
        return evaluate_tasks(model, tokenizer, names, computes, **options)

    for run in ask(adapted, list(depths)):
        name = "dense" if run.kind == "dense" else f"predicted {depths[run.asked]}"
        rows.append(show(name, run.asked, run))
    for name, share, model in others(adapted, tokenizer, depths, set(args.sides.split(",")), args.seed):
        rows += [show(name, share, run) for run in ask(model, [])]
    print(
        json.dumps(
            {"arguments": vars(args), "rows": rows, "provenance": provenance(seed=args.seed, base_digest=digest)}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
