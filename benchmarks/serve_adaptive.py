"""The load-adaptive dial under more load than the model sustains: time to first token, and the quality given up.

Measures how many requests a second the server sustains at full compute (closed loop), then sends `--factor` times as
many, at random times, whether or not the earlier ones are answered, to a server with a fixed dial, to one that may
lower it, and to both with a bound on the wait in the queue.

    python benchmarks/serve_adaptive.py smol-dial --out adaptive.json

A request that has no first token when the arrivals end counts with the time that it has waited until then, so that
a figure for a queue that only grows is a lower bound. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import serving
from serving import Answer, Request

from rheostat import report
from rheostat.report import schema
from rheostat.serve.curves import curves, find_report

TOKENS = (8, 48)
THIRDS = 3


async def open_loop(base: str, requests: Sequence[Request], rate: float, seconds: float) -> list[Answer]:
    """Requests at random times, `rate` a second; those not done by the end are cut off with status -1."""
    draw, tasks, arrivals, partly = random.Random(1), [], [], []
    loop_start = time.perf_counter()
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        for one in requests:
            arrivals.append((arrivals[-1] if arrivals else 0.0) + draw.expovariate(rate))
            if arrivals[-1] > seconds:
                break
            await asyncio.sleep(max(0.0, loop_start + arrivals[-1] - time.perf_counter()))
            partly.append(Answer(-1))
            asked = serving.ask(client, base, "dial", one, {"stream_options": USAGE}, partly[-1])
            tasks.append(asyncio.create_task(asked))
        await asyncio.sleep(max(0.0, loop_start + seconds - time.perf_counter()))
        found = []
        for arrival, task, part in zip(arrivals, tasks, partly, strict=False):
            answer = task.result() if task.done() else Answer(-1, times=part.times or [seconds - arrival])
            answer.sent = arrival
            found.append(answer)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


USAGE = {"include_usage": True}


def summary(answers: Sequence[Answer], seconds: float, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How one server did."""
    done = [one for one in answers if one.status == 200 and one.usage]
    waited = [one for one in answers if one.status in (200, -1) and one.times]
    spent = [one.usage["compute"]["spent"] for one in done if one.usage]
    mean = sum(spent) / max(1, len(spent))
    return {
        "arrived": len(answers),
        "answered": len(done),
        "refused": sum(one.status == 429 for one in answers),
        "unanswered": sum(one.status == -1 for one in answers),
        "failed": sum(one.status not in (200, 429, -1) for one in answers),
        "answers_per_second": len(done) / seconds,
        "first_token_ms": serving.spread([one.times[0] for one in waited if one.times]),
        "first_token_p95_ms_by_third": [
            serving.spread([one.times[0] for one in waited if one.times and int(THIRDS * one.sent / seconds) == third])
            for third in range(THIRDS)
        ],
        "spent": mean,
        "lowered": sum(one.usage["compute"]["lowered"] for one in done if one.usage),
        "perplexity_ratio": {line["text"]: ratio_at(line["points"], mean) for line in lines},
        "points": [(one.sent, one.times[0], one.status) for one in waited if one.times],
    }


def ratio_at(points: Sequence[dict[str, float]], compute: float) -> float:
    """Perplexity over dense at a mean `compute`, on straight lines between the measured points."""
    ordered = sorted((point["compute"], point["ratio"]) for point in points)
    if compute <= ordered[0][0]:
        return ordered[0][1]
    for (low, low_ratio), (high, high_ratio) in itertools.pairwise(ordered):
        if compute <= high:
            return low_ratio + (high_ratio - low_ratio) * (compute - low) / (high - low)
    return ordered[-1][1]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an artifact with a dial and a report of rheostat eval")
    parser.add_argument("--compute-min", type=float, default=0.6)
    parser.add_argument("--factor", type=float, default=2.0, help="load, as a multiple of what is sustained")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals, for each server")
    parser.add_argument("--wait", type=float, default=2.0, help="bound on the wait in the queue, where there is one")
    parser.add_argument("--target", type=float, default=0.3, help="wait at which the dial is lowered")
    parser.add_argument("--out", type=Path, default=Path("adaptive.json"))
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    lowers = ("--adaptive", "--adaptive-target", str(args.target), "--compute-min", str(args.compute_min))
    sheds = ("--queue-seconds", str(args.wait))
    modes = {"fixed": (), "adaptive": lowers, "fixed, bounded wait": sheds, "adaptive, bounded wait": lowers + sheds}
    found = find_report(args.model)
    lines = [] if found is None else [
        {"text": one["text"], "points": one["lines"][0]["points"]} for one in curves(schema.read(found))
    ]  # fmt: skip
    figures: dict[str, Any] = {"provenance": report.origin(seed=0), "modes": {}}
    common = ("--queue", "100000", "--rows", "32", "--dtype", "bfloat16", "--weights", "int8")
    with ExitStack() as stack:
        bases = {}
        for name, flags in modes.items():
            port, log = serving.free_port(), args.out.with_suffix(f".{name.replace(', ', '-').replace(' ', '-')}.log")
            command = serving.ours(args.model, port, *common, *flags)
            bases[name] = stack.enter_context(serving.serving(command, port, log)), log
        for base, log in bases.values():
            serving.wait_up(base, log)
            warm = serving.plan(8, (1.0,), (8, 16), 0.0, 9)
            asyncio.run(serving.closed_loop(base, "dial", warm, 8, lambda one: {}))
        rate = sustained(bases["fixed"][0])
        figures |= {"sustained_per_second": rate, "load_per_second": args.factor * rate, "settings": str(vars(args))}
        print(json.dumps({"sustained requests a second": rate}), flush=True)
        requests = serving.plan(int(3 * args.factor * rate * args.seconds), (1.0,), TOKENS, 0.0, 3)
        for name, (base, _) in bases.items():
            answers = asyncio.run(open_loop(base, requests, args.factor * rate, args.seconds))
            figures["modes"][name] = summary(answers, args.seconds, lines)
            shown = {key: value for key, value in figures["modes"][name].items() if key != "points"}
            print(name, json.dumps(shown), flush=True)
    args.out.write_text(report.to_json(figures, indent=1))
    if args.picture:
        from serve_picture import draw_adaptive

        draw_adaptive(figures, args.picture)


def sustained(base: str) -> float:
    """Requests a second that the server answers when it always has some."""
    requests = serving.plan(64, (1.0,), TOKENS, 0.0, 2)
    answers, seconds = asyncio.run(serving.closed_loop(base, "dial", requests, 32, lambda one: {}))
    assert all(one.status == 200 for one in answers)
    return len(answers) / seconds


if __name__ == "__main__":
    main()
