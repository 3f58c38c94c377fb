"""The load-adaptive dial under more load than the model sustains: time to first token, and the quality given up.

Measures how many requests a second the server sustains at full compute (closed loop), then sends a multiple of that, at
random times, whether or not the earlier ones are answered, to a server with a fixed dial, to one that may lower it,
and to both with a bound on the wait in the queue.

    python benchmarks/serve_adaptive.py run smol-dial --out adaptive.jsonl --cells fixed@1.5,adaptive:0.7@1.5
    python benchmarks/serve_adaptive.py show adaptive.jsonl --report smol-dial/report --picture adaptive.png

A cell is a server, the least `compute` that its requests allow, and the load as a multiple of what is sustained.
`run` writes one line a cell and goes on where it was stopped. Where a quiet machine is scarce,
`up` (with the same settings) starts the servers beforehand, and `run --up` finds them.

A request that has no first token when the arrivals end counts with the time that it has waited until then, so that
a figure for a queue that only grows is a lower bound. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import sys
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

MIXES: dict[str, dict[str, Any]] = {
    "chats": {"tokens": (8, 48), "lengths": serving.CHATS},
    "reading": {"tokens": (4, 16), "lengths": serving.READING},
}
COMMON = ("--queue", "100000", "--rows", "32", "--dtype", "bfloat16", "--weights", "int8")
THIRDS = 3


async def open_loop(
    base: str, requests: Sequence[Request], rate: float, seconds: float, least: float | None
) -> list[Answer]:
    """Requests at random times, `rate` a second, which allow `compute` to fall to `least`; those not done by the end
    are cut off with status -1."""
    draw, tasks, arrivals, partly = random.Random(1), [], [], []
    loop_start = time.perf_counter()
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        for one in requests:
            arrivals.append((arrivals[-1] if arrivals else 0.0) + draw.expovariate(rate))
            if arrivals[-1] > seconds:
                break
            await asyncio.sleep(max(0.0, loop_start + arrivals[-1] - time.perf_counter()))
            partly.append(Answer(-1))
            fields = {"stream_options": {"include_usage": True}} | ({} if least is None else {"compute_min": least})
            asked = serving.ask(client, base, "dial", one, fields, partly[-1])
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


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """How one server did."""
    done = [one for one in answers if one.status == 200 and one.usage]
    waited = [one for one in answers if one.status in (200, -1) and one.times]
    bills = [one.usage["compute"] for one in done if one.usage]
    return {
        "arrived": len(answers),
        "answered": len(done),
        "refused": sum(one.status == 429 for one in answers),
        "unanswered": sum(one.status == -1 for one in answers),
        "failed": sum(one.status not in (200, 429, -1) for one in answers),
        "answers_per_second": len(done) / seconds,
        "first_token_ms": serving.spread([one.times[0] for one in waited if one.times]),
        "first_token_ms_by_third": [
            serving.spread([one.times[0] for one in waited if one.times and int(THIRDS * one.sent / seconds) == third])
            for third in range(THIRDS)
        ],
        "spent": sum(bill["flops"] for bill in bills) / max(1, sum(bill["dense_flops"] for bill in bills)),
        "lowered": sum(bill["lowered"] for bill in bills),
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


def commands(args: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """Name -> the command of a server, and its port."""
    lowers = ("--adaptive", "--adaptive-target", str(args.target))
    sheds = ("--queue-seconds", str(args.wait))
    modes = {"fixed": (), "adaptive": lowers, "fixed+bound": sheds, "adaptive+bound": lowers + sheds}
    asked = {parts(cell)[0] for cell in args.cells.split(",")} | {"fixed"}
    found = {}
    for name in modes:
        if name in asked:
            port = serving.free_port()
            found[name] = serving.ours(args.model, port, *COMMON, *modes[name]), port
    return found


def start(args: argparse.Namespace, stack: ExitStack) -> dict[str, str]:
    """Start the servers, until the stack is closed. Returns their addresses, once all answer."""
    bases = {}
    for name, (command, port) in commands(args).items():
        log = args.out.with_suffix(f".{name}.log")
        bases[name] = stack.enter_context(serving.serving(command, port, log)), log
    for base, log in bases.values():
        serving.wait_up(base, log)
        warm = serving.plan(8, (1.0,), (8, 16), 0.0, 9)
        asyncio.run(serving.closed_loop(base, "dial", warm, 8, lambda one: {}))
    return {name: base for name, (base, _) in bases.items()}


def up(args: argparse.Namespace) -> None:
    """Start the servers and write their addresses to a file; they end with this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        args.up.write_text(json.dumps(start(args, stack)))
        print(f"up, see {args.up}", flush=True)
        signal.pause()


def run(args: argparse.Namespace) -> None:
    """Measure the cells that the file does not have yet."""
    rows = read(args.out) if args.out.exists() else []
    with ExitStack() as stack:
        bases = json.loads(args.up.read_text()) if args.up else start(args, stack)
        rate = next((row["sustained_per_second"] for row in rows if row["mix"] == args.mix), None)
        if rate is None:
            rate = sustained(bases["fixed"], args)
            add(args, {"cell": "sustained", "sustained_per_second": rate})
        for cell in args.cells.split(","):
            name, least, factor = parts(cell)
            if any((row["mix"], row["cell"]) == (args.mix, cell) for row in rows):
                continue
            load = factor * rate
            requests = plan(int(2 * load * args.seconds) + 50, 3, args)
            answers = asyncio.run(open_loop(bases[name], requests, load, args.seconds, least))
            found = {"cell": cell, "sustained_per_second": rate, "load_per_second": load, "seconds": args.seconds}
            add(args, found | summary(answers, args.seconds))


def parts(cell: str) -> tuple[str, float | None, float]:
    """Server, least `compute` and load of a cell: adaptive:0.7@1.5."""
    server, _, load = cell.partition("@")
    name, _, least = server.partition(":")
    return name, float(least) if least else None, float(load)


def plan(number: int, seed: int, args: argparse.Namespace) -> list[Request]:
    """Requests of the mix, all of which ask for full compute."""
    mix = MIXES[args.mix]
    return serving.plan(number, (1.0,), mix["tokens"], 0.0, seed, mix["lengths"])


def sustained(base: str, args: argparse.Namespace) -> float:
    """Requests a second that the server answers when it always has some."""
    requests = plan(64, 2, args)
    answers, seconds = asyncio.run(serving.closed_loop(base, "dial", requests, 32, lambda one: {}))
    assert all(one.status == 200 for one in answers)
    return len(answers) / seconds


def add(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Write a line."""
    row = {"mix": args.mix} | row
    with args.out.open("a") as out:
        out.write(json.dumps(row | {"settings": str(vars(args)), "provenance": report.origin(seed=0)}) + "\n")
    print(json.dumps({key: value for key, value in row.items() if key != "points"}), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(args: argparse.Namespace) -> None:
    """A table, the figures, and a picture."""
    points: dict[str, list[dict[str, float]]] = {}
    for given in args.report:
        for one in curves(schema.read(find_report("", given) or Path(given))):
            points.setdefault(one["text"], []).extend(one["lines"][0]["points"])
    rows = read(args.file)
    print("| mix | server@load | arrived | answers/s | refused | first token p95 by thirds, s | spent | perplexity |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if row["cell"] == "sustained":
            print(f"| {row['mix']} | sustained: {row['sustained_per_second']:.2f} a second | | | | | | |")
            continue
        least = parts(row["cell"])[1] or 1.0
        row["perplexity_ratio_at_least"] = {text: ratio_at(line, least) for text, line in points.items()}
        thirds = ", ".join(f"{one['p95'] / 1e3:.2f}" for one in row["first_token_ms_by_third"] if one)
        ratios = ", ".join(f"{value:.2f}" for value in row["perplexity_ratio_at_least"].values())
        print(
            f"| {row['mix']} | {row['cell']} | {row['arrived']} | {row['answers_per_second']:.1f} | {row['refused']} "
            f"| {thirds} | {row['spent']:.3f} | {ratios} |"
        )
    if args.figures:
        args.figures.write_text(report.to_json({"rows": rows}, indent=1))
    if args.picture:
        from serve_picture import draw_adaptive

        draw_adaptive([row for row in rows if row["cell"] != "sustained"], args.picture)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for verb in (run, up):
        one = verbs.add_parser(verb.__name__)
        one.add_argument("model", help="an artifact with a dial")
        one.add_argument("--cells", default="fixed@1.5,adaptive:0.6@1.5", help="server[:least compute]@load, ...")
        one.add_argument("--mix", default="chats", choices=sorted(MIXES))
        one.add_argument("--seconds", type=float, default=30.0, help="of arrivals, for each cell")
        one.add_argument("--wait", type=float, default=2.0, help="bound on the wait in the queue, where there is one")
        one.add_argument("--target", type=float, default=0.3, help="wait at which the dial is lowered")
        one.add_argument("--out", type=Path, default=Path("adaptive.jsonl"))
        one.add_argument("--up", type=Path, help="file with the addresses of servers that `up` has started")
        one.set_defaults(do=verb)
    one = verbs.add_parser("show")
    one.add_argument("file", type=Path)
    one.add_argument("--report", nargs="*", default=[], help="of rheostat eval: more than one are joined")
    one.add_argument("--figures", type=Path)
    one.add_argument("--picture", type=Path)
    one.set_defaults(do=show)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
