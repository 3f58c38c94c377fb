"""Load on a server: time to first token, time per token and throughput, from 1 to many clients, with mixed dials,
prompts, lengths and clients that leave; beside `transformers serve` and llama.cpp's server on the same machine.

    python benchmarks/serve_load.py run smol-dial --dense path/to/dense --gguf path/to/model.gguf --out load.jsonl
    python benchmarks/serve_load.py check smol-dial load.jsonl     # each answer against the greedy one without a server
    python benchmarks/serve_load.py show load.jsonl --picture load.png

`run` writes one line a cell (a server and a number of clients) and goes on where it was stopped; with `--budget` it
stops by itself after so many seconds. Servers of one run are all up at once, and only one is asked at a time. Where a
quiet machine is scarce, `up` (with the same settings) starts them beforehand, and `run --up` finds them. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import serving
from serving import Request

from rheostat import report

DIALS = (1.0, 0.9, 0.8, 0.7)
TOKENS = (8, 48)

PAGES = ("--cb-num-blocks", "64", "--cb-max-batch-tokens", "512")
"""Of 256 tokens, enough for 32 of our chats, and as many prompt tokens a step as ours. Left to itself it takes most of
the machine's memory, and is killed for it where others need some too."""


@dataclass(frozen=True)
class Side:
    """A server under load."""

    command: list[str]
    model: str
    """What its clients call the model."""
    path: str = "/health"
    dial: str = ""
    """`mixed`: each request its own; `dense`: 1 for all; empty: it has none."""

    def fields(self, one: Request) -> dict[str, Any]:
        """Beyond OpenAI's own."""
        if not self.dial:
            return {}
        return {"compute": one.compute if self.dial == "mixed" else 1.0, "stream_options": {"include_usage": True}}


def sides(args: argparse.Namespace) -> dict[str, tuple[Side, int]]:
    """Name -> the server and its port."""
    found = {}
    for name in args.sides.split(","):
        port = serving.free_port()
        kind, _, dtype = name.partition(":")
        if kind in ("rheostat", "dense"):
            weights = ("--weights", "int8", "--dtype", "bfloat16") if dtype == "int8" else ("--dtype", dtype)
            command = serving.ours(args.model, port, "--queue", "512", "--rows", str(args.rows), *weights)
            side = Side(command, "dial", dial="mixed" if kind == "rheostat" else "dense")
        elif kind in ("transformers", "continuous"):
            program = os.path.join(os.path.dirname(sys.executable), "transformers")
            command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
            command += ["--continuous-batching", *PAGES] if kind == "continuous" else []
            side = Side(command, args.dense)
        elif kind == "llama.cpp":
            command = [sys.executable, "-m", "llama_cpp.server", "--model", args.gguf, "--port", str(port)]
            command += ["--n_ctx", "2048", "--n_threads", str(os.cpu_count()), "--n_threads_batch", str(os.cpu_count())]
            side = Side([*command, "--interrupt_requests", "False", "--verbose", "False"], "any", "/v1/models")
        else:
            raise SystemExit(f"--sides {name}: rheostat, dense, transformers, continuous or llama.cpp")
        found[name] = side, port
    return found


def cells(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(side, clients, requests) that the file does not have yet: all sides at one level, then the next level."""
    done = set()
    if args.out.exists():
        done = {(row["side"], row["clients"]) for row in read(args.out)}
    levels = [int(one) for one in args.clients.split(",")]
    counts = dict(one.rsplit("=", 1) for one in args.requests.split(","))
    names = args.sides.split(",")
    return [
        (name, level, max(int(counts.get(name, counts["all"])), 3 * level // 2))
        for level in levels
        for name in names
        if (name, level) not in done
    ]


def run(args: argparse.Namespace) -> None:
    """Measure what is missing."""
    started, left = time.monotonic(), cells(args)
    args.sides = ",".join(dict.fromkeys(name for name, _, _ in left))
    if not left:
        print("nothing is missing")
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with ExitStack() as stack:
        if args.up:
            bases = json.loads(args.up.read_text())
            found = {name: (side, bases[name]) for name, (side, _) in sides(args).items()}
        else:
            found = start(args, stack)
        for side, base in found.values():
            asyncio.run(serving.closed_loop(base, side.model, [Request("Hello.", 1.0, 4, False)], 1, side.fields))
        for name, clients, number in left:
            if time.monotonic() - started > args.budget:
                print(f"the time is up: {len(left)} cells in all, {len(cells(args))} of them missing")
                return
            row = measure(*found[name], clients, number, args, tokenizer)
            shown = {"side": name, "clients": clients} | row
            with args.out.open("a") as out:
                out.write(json.dumps(shown | {"provenance": report.origin(seed=args.seed)}) + "\n")
            print(
                json.dumps({key: value for key, value in shown.items() if key not in ("answers", "plan")}), flush=True
            )


def start(args: argparse.Namespace, stack: ExitStack) -> dict[str, tuple[Side, str]]:
    """Start the servers, until the stack is closed. Returns name -> the server and its address, once all answer."""
    found = {}
    for name, (side, port) in sides(args).items():
        log = args.out.with_suffix(f".{name.replace(':', '-')}.log")
        found[name] = side, stack.enter_context(serving.serving(side.command, port, log)), log
    for side, base, log in found.values():
        serving.wait_up(base, log, side.path)
    return {name: (side, base) for name, (side, base, _) in found.items()}


def up(args: argparse.Namespace) -> None:
    """Start the servers and write their addresses to a file; they end with this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        bases = {name: base for name, (_, base) in start(args, stack).items()}
        args.up.write_text(json.dumps(bases))
        print(f"up, see {args.up}", flush=True)
        signal.pause()


def measure(
    side: Side, base: str, clients: int, number: int, args: argparse.Namespace, tokenizer: Any
) -> dict[str, Any]:
    """One cell."""
    requests = serving.plan(number, DIALS, TOKENS, args.leave, args.seed + clients)
    answers, seconds = asyncio.run(serving.closed_loop(base, side.model, requests, clients, side.fields))

    def num_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    row = {"requests": number} | serving.figures(answers, seconds, num_tokens)
    return row | {"plan": [asdict(one) for one in requests], "answers": serving.listed(answers)}


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(args: argparse.Namespace) -> None:
    """Compare each answer of our server in float32 with the greedy one, written without a server."""
    from serve_offline import Offline

    offline = Offline(args.model, max(TOKENS))
    lost = wrong = checked = 0
    for row in sorted(read(args.file), key=lambda row: -row["clients"]):
        if row["side"] != "rheostat:float32":
            continue
        for plan, answer in zip(row["plan"], row["answers"], strict=True):
            expected = offline.text(plan["prompt"], plan["compute"], plan["tokens"])
            checked += 1
            lost += answer["status"] not in (200, 499)
            same = answer["text"] == expected if answer["status"] == 200 else expected.startswith(answer["text"])
            if not same:
                wrong += 1
                print(json.dumps({"plan": plan, "answer": answer["text"], "expected": expected}))
        print(f"{checked} requests: {lost} lost, {wrong} not the greedy answer at their dial", flush=True)


def show(args: argparse.Namespace) -> None:
    """A table, the figures without the texts, and a picture."""
    rows = [{k: v for k, v in row.items() if k not in ("plan", "answers")} for row in read(args.file)]
    print("| server | clients | requests | tokens/s | first token ms, p50 / p95 | ms a token, p50 / p95 | refused |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(rows, key=lambda row: (row["clients"], row["side"])):
        first, each = row["first_token_ms"], row["ms_per_token"]
        print(
            f"| {row['side']} | {row['clients']} | {row['requests']} | {row['tokens_per_second']:.1f} "
            f"| {first['p50']:.0f} / {first['p95']:.0f} | {each['p50']:.1f} / {each['p95']:.1f} | {row['refused']} |"
        )
    if args.figures:
        args.figures.write_text(report.to_json({"rows": rows}, indent=1))
    if args.picture:
        from serve_picture import draw_load

        draw_load(rows, args.picture)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for verb in (run, up):
        one = verbs.add_parser(verb.__name__)
        one.add_argument("model", help="an artifact with a dial")
        one.add_argument("--dense", help="checkpoint folder that `transformers serve` serves")
        one.add_argument("--gguf", help="what llama.cpp's server serves")
        one.add_argument("--sides", default="rheostat:float32", help="kind:dtype, separated by commas")
        one.add_argument("--rows", type=int, default=32)
        one.add_argument("--out", type=Path, default=Path("load.jsonl"))
        one.add_argument("--up", type=Path, help="file with the addresses of servers that `up` has started")
        one.set_defaults(do=verb)
        if verb is run:
            one.add_argument("--clients", default="1,2,4,8,16,32")
            number = "of a level, side=number; all=number for the rest; at least one and a half times the clients"
            one.add_argument("--requests", default="all=48", help=number)
            one.add_argument("--leave", type=float, default=0.1, help="share of clients that leave in the middle")
            one.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell is begun")
            one.add_argument("--seed", type=int, default=0)
    one = verbs.add_parser("check")
    one.add_argument("model")
    one.add_argument("file", type=Path)
    one.set_defaults(do=check)
    one = verbs.add_parser("show")
    one.add_argument("file", type=Path)
    one.add_argument("--figures", type=Path)
    one.add_argument("--picture", type=Path)
    one.set_defaults(do=show)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
