"""Where the time of a loaded engine goes, at several settings of the dial: prompts, steps, and the rest. Without HTTP.

    python benchmarks/serve_profile.py smol-dial --computes 1.0,0.8,0.6 --out profile.json

The same chats for each setting, all there from the start, so that the batch is full until the last few.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import serving

from rheostat import report
from rheostat.commands import load
from rheostat.config import Common
from rheostat.serve.backend import make_backend
from rheostat.serve.engine import Engine
from rheostat.serve.jobs import Done, Event, Failed, Job
from rheostat.serve.scheduler import Limits, Scheduler


class Timed:
    """A backend that adds up how long its calls take."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.prompts = self.steps = 0.0
        self.num_steps = self.num_rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def join(self, joins: Any) -> None:
        """As `Backend.join`."""
        started = time.perf_counter()
        self.inner.join(joins)
        self.prompts += time.perf_counter() - started

    def read(self, join: Any, start: int, stop: int) -> None:
        """As `Backend.read`."""
        started = time.perf_counter()
        self.inner.read(join, start, stop)
        self.prompts += time.perf_counter() - started

    def step(self, rows: Any, token_ids: Any, computes: Any) -> None:
        """As `Backend.step`."""
        started = time.perf_counter()
        self.inner.step(rows, token_ids, computes)
        self.steps += time.perf_counter() - started
        self.num_steps, self.num_rows = self.num_steps + 1, self.num_rows + len(rows)


class Crowd:
    """Receives the events of many jobs."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self.ended = threading.Semaphore(0)

    def __call__(self, event: Event) -> None:
        """An event of one of them."""
        if isinstance(event, Done):
            self.spent.append(event.bill.compute)
        if isinstance(event, Done | Failed):
            self.ended.release()


def one_setting(loaded: Any, backend: Timed, jobs: list[Job], rows: int, prefill_tokens: int) -> dict[str, float]:
    """All jobs through an engine of their own."""
    limits = Limits(rows=rows, queue=len(jobs), prefill_tokens=prefill_tokens)
    engine, crowd = Engine(loaded.adapted, loaded.tokenizer, backend, Scheduler(limits)), Crowd()
    backend.reset()
    for job in jobs:
        engine.submit(job, crowd)
    started = time.perf_counter()
    engine.start()
    for _ in jobs:
        crowd.ended.acquire()
    seconds = time.perf_counter() - started
    engine.stop()
    return {
        "requests_per_second": len(jobs) / seconds,
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "prompt_ms_per_request": 1e3 * backend.prompts / len(jobs),
        "step_ms": 1e3 * backend.steps / max(1, backend.num_steps),
        "rows_per_step": backend.num_rows / max(1, backend.num_steps),
        "step_ms_per_request": 1e3 * backend.steps / len(jobs),
        "rest_ms_per_request": 1e3 * (seconds - backend.prompts - backend.steps) / len(jobs),
        "spent": sum(crowd.spent) / max(1, len(crowd.spent)),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--computes", default="1.0,0.8,0.6")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    args = parser.parse_args()
    loaded = load(args.model, Common(dtype=args.dtype))
    backend = Timed(make_backend(loaded.adapted, "auto", args.weights))
    requests = serving.plan(args.requests, (1.0,), (8, 48), 0.0, 2)
    found: dict[str, dict[str, float]] = {}
    for compute in (1.0, *(float(one) for one in args.computes.split(","))):  # the first to warm up
        compute = max(compute, loaded.adapted.dial.low)
        jobs = [
            Job(id=str(place), prompt=chat(loaded.tokenizer, one.prompt), max_new_tokens=one.tokens,
                prefill_compute=compute, compute=compute, ignores_end=True)
            for place, one in enumerate(requests)
        ]  # fmt: skip
        found[f"{compute:.3f}"] = one_setting(loaded, backend, jobs, args.rows, args.prefill_tokens)
        print(f"{compute:.3f}", json.dumps(found[f"{compute:.3f}"]), flush=True)
    args.out.write_text(report.to_json({"settings": found, "provenance": report.origin(seed=0)}, indent=1))


def chat(tokenizer: Any, content: str) -> list[int]:
    """The tokens of a chat of one message."""
    message = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
