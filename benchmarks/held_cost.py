"""What holding requests costs in time: a step of decoding and a prompt on our own runtime, with and without.

Both sides of a step do the same work: what a held answer was steered to is written down, and the other side takes the
same tokens at the same settings without steering. Prompts without holding are read at the setting of the table that
spends the same.

    python benchmarks/held_cost.py ARTIFACT --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

PROMPTS = (64, 512)


def steps(adapted: Any, runtime: Any, rows: int, new: int, settings: list[torch.Tensor] | None) -> tuple[Any, Any]:
    """Milliseconds of each step, and its settings; `settings` are taken where they are given, else rows are held."""
    from rheostat.runtime.batch import Batch
    from rheostat.spending import spend

    ids = torch.randint(5, 40000, (rows, 96), generator=torch.Generator().manual_seed(0))
    times, used = [], []
    with torch.inference_mode(), spend(0.8, keep_passes=False, hold=True):
        batch = Batch.read(
            runtime, ids, None, adapted.settings("prefill", rows), num_new=new, account=adapted.account(rows)
        )
        take = runtime.step

        def watched(token_ids: Any, positions: Any, cache: Any, given: Any) -> Any:
            used.append(given)
            return take(token_ids, positions, cache, given)

        if settings is not None:
            batch._account = None
        runtime.step = watched
        try:
            for place in range(new):
                began = time.perf_counter()
                batch.step(ids[:, place % 96].contiguous(), None if settings is None else settings[place])
                times.append(1e3 * (time.perf_counter() - began))
        finally:
            del runtime.step
        batch.settle()
    return times, used


def prompt(adapted: Any, runtime: Any, length: int, asked: float, is_held: bool) -> tuple[float, float]:
    """Milliseconds of one prompt, and what it spent."""
    from rheostat.runtime.batch import Batch
    from rheostat.spending import spend

    ids = torch.randint(5, 40000, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode(), spend(asked, keep_passes=False, hold=is_held) as meter:
        began = time.perf_counter()
        Batch.read(runtime, ids, None, adapted.settings("prefill", 1), account=adapted.account(1))
        return 1e3 * (time.perf_counter() - began), meter.compute


def equal(adapted: Any, runtime: Any, length: int) -> float:
    """What to ask of the table so that a prompt spends what it spends held at 0.8."""
    goal = prompt(adapted, runtime, length, 0.8, True)[1]
    grid = np.linspace(adapted.dial.low, 1.0, 12)
    return float(np.interp(goal, [prompt(adapted, runtime, length, float(one), False)[1] for one in grid], grid))


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"ms": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def main() -> None:
    """See the module."""
    import rheostat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--new", type=int, default=60)
    args = parser.parse_args()
    adapted, _ = rheostat.load(args.model, dtype=args.dtype)
    runtime = adapted.runtime("native", args.weights, with_forms=True)
    found: dict[str, dict[str, list[float]]] = {}

    def note(what: str, side: str, times: list[float]) -> None:
        found.setdefault(what, {}).setdefault(side, []).extend(times)

    for rows in (1, 8):
        settings = steps(adapted, runtime, rows, args.new, None)[1]
        for turn in range(args.rounds):
            for side in ("held", "free") if turn % 2 else ("free", "held"):
                note(
                    f"step, {rows} rows",
                    side,
                    steps(adapted, runtime, rows, args.new, settings if side == "free" else None)[0],
                )
    for length in PROMPTS:
        asked = equal(adapted, runtime, length)
        for turn in range(2 * args.rounds):
            for side in ("held", "free") if turn % 2 else ("free", "held"):
                took = prompt(adapted, runtime, length, 0.8 if side == "held" else asked, side == "held")[0]
                note(f"prompt of {length}", side, [took])
    table = {what: {side: summary(times) for side, times in sides.items()} for what, sides in found.items()}
    for what, sides in table.items():
        held, free = sides["held"]["ms"], sides["free"]["ms"]
        print(f"{what}: held {held} ms, free {free} ms: {held / free:.3f}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
