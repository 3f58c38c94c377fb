"""How fast are benchmark tasks under the dial? The stock harness on the dense model, and ours at each dial.

    python benchmarks/harness_speed.py smollm2-135m --task-data DATA --task hellaswag --rows 500
    python benchmarks/harness_speed.py ARTIFACT --task-data DATA --compute 1.0,0.8 --rows 500 --rounds 3

Each round times all sides once, in turn, on the same requests, so that drift of the machine hits all alike; medians are
printed. The stock side is lm-eval's own adapter, in each of --batch-rows, of which the fastest is the one to beat. It
also says how far the scores are apart at dial 1.0. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

import rheostat
from rheostat.adapted import Adapted
from rheostat.eval.harness import BATCH_TOKENS, DialLM, make_lm
from rheostat.eval.tasks.find import find_tasks
from rheostat.models import load
from rheostat.provenance import provenance

Scores = list[tuple[float, bool]]


def under_the_dial(lm: DialLM, compute: float, requests: list[Any]) -> Scores:
    """Our side."""
    lm.open(compute)
    return lm.loglikelihood(requests)


def stock(model: str, tokenizer: Any, rows: int, dtype: str) -> Callable[[list[Any]], Scores]:
    """The dense model in lm-eval's own adapter. A model of its own, because ours carries hooks."""
    dense, _ = load(model, dtype=dtype)
    if isinstance(dense, Adapted):
        dense = dense.detach()
    return partial(HFLM(pretrained=dense, tokenizer=tokenizer, batch_size=rows).loglikelihood, disable_tqdm=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--task", default="hellaswag", help="one that asks for log-likelihoods")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute", default="1.0")
    parser.add_argument("--batch-rows", default="8,32", help="rows in a batch of the stock harness")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="tokens in a batch of ours")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    found, tokenizer = rheostat.load(args.model, dtype=args.dtype)
    adapted = found if isinstance(found, Adapted) else Adapted(found)
    (task,) = find_tasks([args.task], args.task_data).values()
    task.build_all_requests(limit=args.rows)
    requests = task.instances
    lm = make_lm(adapted, tokenizer, batch_tokens=args.batch_tokens)
    sides: dict[str, Callable[[list[Any]], Scores]] = {
        f"stock, {rows} rows": stock(args.model, tokenizer, int(rows), args.dtype)
        for rows in args.batch_rows.split(",")
    }
    rivals = list(sides)
    sides |= {f"dial {c}": partial(under_the_dial, lm, float(c)) for c in args.compute.split(",")}

    times: dict[str, list[float]] = {side: [] for side in sides}
    scores: dict[str, Scores] = {}
    for score in sides.values():  # warms up
        score(requests[:16])
    for _ in range(args.rounds):
        for side, score in sides.items():
            start = time.perf_counter()
            scores[side] = score(requests)
            times[side].append(time.perf_counter() - start)

    medians = {side: statistics.median(taken) for side, taken in times.items()}
    best = min(medians[side] for side in rivals)
    rows = {}
    print(f"{len(requests):,} requests, {args.rows} rows of {args.task}")
    print(f"{'side':<18}{'seconds':>10}{'to stock':>10}{'requests/s':>12}{'most apart':>12}")
    for side, seconds in medians.items():
        apart = max(abs(a - b) for (a, _), (b, _) in zip(scores[side], scores[rivals[0]], strict=True))
        rows[side] = {"seconds": times[side], "to_stock": seconds / best, "apart": apart}
        print(f"{side:<18}{seconds:>10.2f}{seconds / best:>9.2f}x{len(requests) / seconds:>12.1f}{apart:>12.2g}")
    settings = vars(args) | {"task_data": str(args.task_data), "threads": torch.get_num_threads()}
    print(json.dumps({"sides": rows, "settings": settings, "provenance": provenance()}))


if __name__ == "__main__":
    main()
