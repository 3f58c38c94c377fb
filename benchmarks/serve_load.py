"""Load on a server: time to first token, time per token and throughput, from 1 to many clients, with mixed dials.

Starts `rheostat serve` (and, with --against, `transformers serve` on the same machine), sends the same chats to each in
turn, level by level, and ends them. Loopback only.

    python benchmarks/serve_load.py smol-dial --against path/to/dense --clients 1,4,8 --requests 24 --out load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from rheostat import report

TOPICS = ("rivers", "bread", "the moon", "old maps", "bees", "glass", "salt", "winter", "a violin", "bridges")
START_SECONDS = 150


def plan(num: int, dials: list[float], longest: int, leave: float, seed: int) -> list[dict[str, Any]]:
    """Requests: a prompt, a dial, a length, and after how many pieces the client leaves (0: it stays)."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"Write {draw.choice(('one sentence', 'a short story', 'a list'))} about {draw.choice(TOPICS)}.",
            "compute": draw.choice(dials),
            "tokens": draw.randint(longest // 2, longest),
            "leaves": 3 if draw.random() < leave else 0,
        }
        for _ in range(num)
    ]


async def ask(client: httpx.AsyncClient, base: str, model: str, one: dict[str, Any], *, dial: bool) -> dict[str, Any]:
    """One chat, streamed; times in seconds since it was sent."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": one["prompt"]}],
        "max_tokens": one["tokens"],
        "temperature": 0,
        "stream": True,
    }
    if dial:
        body |= {"compute": one["compute"], "stream_options": {"include_usage": True}}
    started, times, text, usage = time.perf_counter(), [], "", None
    async with client.stream("POST", f"{base}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return {"status": answer.status_code}
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    times.append(time.perf_counter() - started)
                    text += piece
            if one["leaves"] and len(times) >= one["leaves"]:
                return {"status": 499}
    return {"status": 200, "times": times, "text": text, "usage": usage}


async def level(base: str, model: str, requests: list[dict[str, Any]], clients: int, *, dial: bool) -> dict[str, Any]:
    """All requests, so many at once."""
    waiting = list(enumerate(requests))[::-1]
    answers: dict[int, dict[str, Any]] = {}

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            place, one = waiting.pop()
            answers[place] = await ask(client, base, model, one, dial=dial)

    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=300) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    seconds = time.perf_counter() - started
    whole = [one for one in answers.values() if one["status"] == 200 and one["times"]]
    tokens = sum(one["usage"]["completion_tokens"] if one["usage"] else len(one["times"]) for one in whole)
    gaps = [(one["times"][-1] - one["times"][0]) / (len(one["times"]) - 1) for one in whole if len(one["times"]) > 1]
    return {
        "clients": clients,
        "requests": len(requests),
        "answered": len(whole),
        "left": sum(one["status"] == 499 for one in answers.values()),
        "refused": sum(one["status"] not in (200, 499) for one in answers.values()),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_token_ms": spread([one["times"][0] for one in whole]),
        "ms_per_token": spread(gaps),
        "texts": [answers[place].get("text") for place in range(len(requests))],
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile, in ms."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {
        "p50": 1e3 * statistics.median(ordered),
        "p95": 1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    }


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[str]:
    """A server of its own process until the block ends. Yields its address."""
    base = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_up(base):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} did not start: see {log}")
                time.sleep(0.5)
            yield base
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


def is_up(base: str) -> bool:
    """Whether a server answers."""
    try:
        return httpx.get(f"{base}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def offline(model: str, dtype: str, requests: list[dict[str, Any]]) -> list[str]:
    """The greedy answers without a server."""
    from rheostat.commands import load
    from rheostat.config import Common
    from rheostat.decode import stream
    from rheostat.serve.engine import end_ids
    from rheostat.spending import spend

    loaded, found = load(model, Common(dtype=dtype)), []
    ends = tuple(end_ids(loaded.adapted, loaded.tokenizer))
    for one in requests:
        message = [{"role": "user", "content": one["prompt"]}]
        text = loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with spend(one["compute"], keep_passes=False):
            steps = stream(loaded.adapted, ids, max_new_tokens=one["tokens"], eos_token_ids=ends)
            new = [int(step.token_ids[0]) for step in steps]
        found.append(loaded.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--against", help="checkpoint folder that `transformers serve` serves")
    parser.add_argument("--continuous", action="store_true", help="with its continuous batching")
    parser.add_argument("--clients", default="1,4,8")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--dials", default="1.0,0.9,0.8,0.7")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--leave", type=float, default=0.1, help="share of clients that leave in the middle")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--check", action="store_true", help="compare each answer with the offline greedy one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("load.json"))
    args = parser.parse_args()
    dials = [float(one) for one in args.dials.split(",")]
    requests = plan(args.requests, dials, args.tokens, args.leave, args.seed)
    ours, theirs = free_port(), free_port()
    run = [sys.executable, "-m", "rheostat", "serve", args.model, "--name", "dial", "--port", str(ours),
           "--queue", "512", "--dtype", args.dtype, "--weights", args.weights]  # fmt: skip
    rows: list[dict[str, Any]] = []
    with serving(run, ours, args.out.with_suffix(".rheostat.log")) as base:
        sides = [("rheostat", base, "dial", True)]
        if args.against:
            other = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", "--host", "127.0.0.1",
                     "--port", str(theirs), "--dtype", args.dtype]  # fmt: skip
            other += ["--continuous-batching"] if args.continuous else []
            with serving(other, theirs, args.out.with_suffix(".transformers.log")) as second:
                measure(rows, [*sides, ("transformers", second, args.against, False)], args, requests)
        else:
            measure(rows, sides, args, requests)
    figures: dict[str, Any] = {"model": args.model, "rows": rows, "provenance": report.origin(seed=args.seed)}
    if args.check:
        expected = offline(args.model, args.dtype, requests)
        for row in rows:
            if row["side"] == "rheostat":
                pairs = [(a, b) for a, b in zip(row["texts"], expected, strict=True) if a is not None]
                row["checked"], row["equal"] = len(pairs), sum(a == b for a, b in pairs)
                print(f"{row['clients']} clients: {row['equal']} of {row['checked']} answers equal the offline ones")
    for row in rows:
        del row["texts"]
    args.out.write_text(report.to_json(figures, indent=1))


def measure(rows: list[dict[str, Any]], sides: list[Any], args: argparse.Namespace, requests: list[Any]) -> None:
    """Each level on each side in turn."""
    for _, base, model, dial in sides:
        asyncio.run(level(base, model, requests[:1], 1, dial=dial))  # what is made at the first request
    for clients in (int(one) for one in args.clients.split(",")):
        for name, base, model, dial in sides:
            row = {"side": name} | asyncio.run(level(base, model, requests, clients, dial=dial))
            rows.append(row)
            shown = {key: value for key, value in row.items() if key not in ("texts", "side")}
            print(name, json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
