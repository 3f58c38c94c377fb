"""How far from the right answer is the model after a predicted prompt? Several sets of maps on the same questions.

    python benchmarks/predicted_answers.py closed=smol-kvp,trained=smol-kvp-cpu --exact 1,16 --task-data data --rows 40

Sides take turns on each question, the dense model first, and are compared with it question by question; after
`--seconds` no further question is begun. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from predicted_prompt import read_plain
from prompt_answers import Reader, items, score

import rheostat
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.provenance import provenance


def sides(artifacts: str, exact: list[int], depth: int, dtype: torch.dtype) -> dict[str, Reader]:
    """Name -> how it reads a prompt."""
    found: dict[str, Reader] = {}
    for one in artifacts.split(","):
        name, _, folder = one.partition("=")
        adapted = rheostat.load(folder, dtype=dtype)[0]
        found.setdefault("dense", lambda prompts, model=adapted.model: (model, *read_plain(model, prompts)))
        for number in exact:
            method = replace(adapted.method, exact_tokens=number)
            found[f"{name}, {number} exact"] = partial(read, adapted, method, depth)
    return found


def read(adapted: Any, method: KVPrediction, depth: int, prompts: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
    """The prompt through the maps of one depth; the last token is read again with the answer."""
    cache = method.make_cache(adapted.model)
    with rheostat.spend(native={method.name: float(adapted.geometry.num_layers - depth)}):
        method.prefill(adapted.model, prompts, torch.ones_like(prompts), cache)
    cache.crop(-1)
    return adapted.model, cache, torch.ones_like(prompts[:, :-1])


def main(given: list[str]) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", help="name=folder, several separated by commas")
    parser.add_argument("--exact", default="1", help="last tokens that the model itself reads, separated by commas")
    parser.add_argument("--depth", type=int, default=15)
    parser.add_argument("--tasks", default="nq_oracle,lambada_openai")
    parser.add_argument("--task-data", required=True)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(given)
    readers = sides(args.artifacts, [int(one) for one in args.exact.split(",")], args.depth, getattr(torch, args.dtype))
    tokenizer = rheostat.load(args.artifacts.split(",")[0].partition("=")[2], dtype=torch.bfloat16)[1]
    asked = {name: items(tokenizer, name, Path(args.task_data), args.rows) for name in args.tasks.split(",")}
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    started = time.perf_counter()
    for row in range(args.rows):
        if time.perf_counter() - started > args.seconds:
            break
        for task, found in asked.items():
            for name, reader in readers.items():
                with torch.no_grad():
                    scores.setdefault((task, name), []).append(score(found[row : row + 1], reader))
    rows = [line(task, name, scores) for task in asked for name in readers]
    print(json.dumps({"arguments": vars(args), "rows": rows, "provenance": provenance()}))


def line(task: str, name: str, scores: dict[tuple[str, str], list[dict[str, float]]]) -> dict[str, Any]:
    """One row of the table, printed."""
    mine, dense = (torch.tensor([(one["nats"], one["hit"]) for one in scores[task, side]]) for side in (name, "dense"))
    gap = mine[:, 0] - dense[:, 0]
    error = float(gap.std()) / math.sqrt(len(gap))
    nats, hit = mine.mean(0).tolist()
    print(
        f"{task:15s} {name:24s} {nats:7.3f} nats ({float(gap.mean()):+.3f} ± {error:.3f}), {hit:.3f} right", flush=True
    )
    return {
        "task": task,
        "side": name,
        "rows": len(mine),
        "nats": nats,
        "more": float(gap.mean()),
        "error": error,
        "hit": hit,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
