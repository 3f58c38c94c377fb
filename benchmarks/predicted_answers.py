"""How far from the right answer is the model after a predicted prompt? Sets of maps and depths on the same rows.

    python benchmarks/predicted_answers.py closed=smol-kvp,trained=smol-kvp-cpu --exact 1,16 --task-data data --rows 40
    python benchmarks/predicted_answers.py maps=smol-kvp --depths 12,15,20,25 --dropped --task-data data --rows 40 \
        --data novels=a.txt,wikitext=b.txt --windows 16

Sides take turns on each row, the dense model first, and are compared with it row by row: nats of a question's right
answer, and nats a token of the last tokens of a window of text, after a prompt. `--dropped` adds, for each depth,
the whole model on as large a random share of the prompt's tokens as the depth costs. After `--seconds` no further row
is begun. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from predicted_prompt import losses, read_dropped, read_plain
from prompt_answers import Reader, items, score

import rheostat
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.provenance import provenance
from rheostat.text import pack, read_texts

DRAWN = 16
"""Windows that are drawn of a text, however many are read: another number would draw others."""

Scores = dict[tuple[str, str], list[tuple[float, float]]]
"""(task or text, side) -> of each row its nats, and whether all of the answer would have been written."""


def sides(artifacts: str, exact: list[int], depths: list[int], dropped: bool, dtype: torch.dtype) -> dict[str, Reader]:
    """Name -> how it reads a prompt."""
    found: dict[str, Reader] = {}
    for one in artifacts.split(","):
        name, _, folder = one.partition("=")
        adapted = rheostat.load(folder, dtype=dtype)[0]
        found.setdefault("dense", lambda prompts, model=adapted.model: (model, *read_plain(model, prompts)))
        for depth in depths:
            at = f"{name}, k = {depth}" if len(depths) > 1 else name
            for number in exact:
                method = replace(adapted.method, exact_tokens=number)
                found[f"{at}, {number} exact"] = partial(read, adapted, method, depth)
            if dropped:
                found.setdefault(f"dropped, k = {depth}", _dropping(adapted, depth))
    return found


def read(adapted: Any, method: KVPrediction, depth: int, prompts: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
    """The prompt through the maps of one depth; the last token is read again with the answer."""
    cache = method.make_cache(adapted.model)
    with rheostat.spend(native={method.name: float(adapted.geometry.num_layers - depth)}):
        method.prefill(adapted.model, prompts, torch.ones_like(prompts), cache)
    cache.crop(-1)
    return adapted.model, cache, torch.ones_like(prompts[:, :-1])


def _dropping(adapted: Any, depth: int) -> Reader:
    """The whole model on the share of a prompt's tokens that a depth costs by the dial."""
    dial = zip(adapted.dial.settings[adapted.method.name], adapted.dial.compute, strict=True)
    share = {adapted.geometry.num_layers - int(setting): compute for setting, compute in dial}[depth]
    drawn = torch.Generator().manual_seed(depth)
    return lambda prompts: (adapted.model, *read_dropped(adapted.model, prompts, share, drawn))


def work(tokenizer: Any, args: argparse.Namespace) -> dict[str, list[Callable[[Reader], tuple[float, float]]]]:
    """Of each text and task its rows, each to be scored with a reader."""
    found: dict[str, list[Callable[[Reader], tuple[float, float]]]] = {}

    def nats(window: torch.Tensor, reader: Reader) -> tuple[float, float]:
        return float(losses(*reader(window[:, : -args.answer]), window, args.answer)), math.nan

    def answered(item: Any, reader: Reader) -> tuple[float, float]:
        one = score([item], reader)
        return one["nats"], one["hit"]

    for one in filter(None, args.data.split(",")):
        name, _, file = one.partition("=")
        windows = pack(tokenizer, read_texts(file), length=384 + args.answer, limit=DRAWN, seed=5)[: args.windows]
        found[name] = [partial(nats, window) for window in windows.split(1)]
    for name in filter(None, args.tasks.split(",")):
        asked = items(tokenizer, name, Path(args.task_data), args.rows, args.first)
        found[name] = [partial(answered, item) for item in asked]
    return found


@torch.no_grad()
def take(readers: dict[str, Reader], rows: dict[str, list[Any]], seconds: float) -> Scores:
    """All sides on all rows; texts, tasks and sides take turns."""
    scores: Scores = {}
    started = time.perf_counter()
    for place in range(max(map(len, rows.values()))):
        if time.perf_counter() - started > seconds:
            break
        for name, found in rows.items():
            for side, reader in readers.items() if place < len(found) else ():
                scores.setdefault((name, side), []).append(found[place](reader))
    return scores


def line(task: str, name: str, scores: Scores) -> dict[str, Any]:
    """One row of the table, printed."""
    mine, dense = (torch.tensor(scores[task, side], dtype=torch.float64) for side in (name, "dense"))
    gap = mine[:, 0] - dense[:, 0]
    more, error = float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))
    nats, hit = mine.mean(0).tolist()
    told = f"{hit:.3f} right" if hit == hit else f"{math.exp(more):.3f} ± {math.exp(more) * error:.3f} x dense"
    print(f"{task:15s} {name:24s} {nats:7.3f} nats ({more:+.3f} ± {error:.3f}), {told}", flush=True)
    row = {"task": task, "side": name, "rows": len(mine), "nats": nats, "more": more, "error": error}
    return row | ({"hit": hit} if hit == hit else {"ratio": math.exp(more)}) | {"each": mine[:, 0].tolist()}


def main(given: list[str]) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", help="name=folder, several separated by commas")
    parser.add_argument("--exact", default="1", help="last tokens that the model itself reads, separated by commas")
    parser.add_argument("--depths", default="15", help="separated by commas")
    parser.add_argument("--dropped", action="store_true", help="a random share of the tokens beside each depth")
    parser.add_argument("--tasks", default="nq_oracle,lambada_openai")
    parser.add_argument("--task-data")
    parser.add_argument("--rows", type=int, default=40, help="of each task")
    parser.add_argument("--first", type=int, default=0, help="row of each task to begin with")
    parser.add_argument("--data", default="", help="texts: name=file, several separated by commas")
    parser.add_argument("--windows", type=int, default=DRAWN, help=f"of each text, at most {DRAWN}")
    parser.add_argument("--answer", type=int, default=128, help="last tokens of a window, after a prompt of 384")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(given)
    exact, depths = ([int(one) for one in text.split(",")] for text in (args.exact, args.depths))
    readers = sides(args.artifacts, exact, depths, args.dropped, getattr(torch, args.dtype))
    tokenizer = rheostat.load(args.artifacts.split(",")[0].partition("=")[2], dtype=torch.bfloat16)[1]
    rows = work(tokenizer, args)
    scores = take(readers, rows, args.seconds)
    told = [line(task, name, scores) for task in rows for name in readers]
    print(json.dumps({"arguments": vars(args), "rows": told, "provenance": provenance()}))


if __name__ == "__main__":
    main(sys.argv[1:])
