"""Servers as processes of their own, and clients that load them: what `serve_load.py` and `serve_adaptive.py` share."""

from __future__ import annotations

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

TOPICS = ("rivers", "bread", "the moon", "old maps", "bees", "glass", "salt", "winter", "a violin", "bridges")
FORMS = ("one sentence", "a short story", "a list")
SENTENCES = (
    "The river rose in the night, and by the morning the old bridge was gone.",
    "Salt was carried over the mountains by mules, two sacks to each animal.",
    "In the workshop a violin lay open, its ribs held by forty small clamps.",
    "Nobody had drawn the coast before, so the map ended in a careful blank.",
)
START_SECONDS = 150
STARTED: dict[str, subprocess.Popen[bytes]] = {}
"""Address -> the server's process."""


@dataclass(frozen=True)
class Request:
    """A chat to send."""

    prompt: str
    compute: float
    tokens: int
    """At most, in the answer."""
    leaves: bool
    """The client leaves in the middle of the answer."""


@dataclass
class Answer:
    """What came of it; times in seconds since it was sent."""

    status: int
    """As HTTP has it; 499 is a client that left, 0 a stream that broke off."""
    text: str = ""
    times: list[float] | None = None
    """Of each piece of text."""
    usage: dict[str, Any] | None = None
    sent: float = 0.0
    """On the benchmark's clock."""


CHATS = (6, 3, 1)
"""Of ten prompts so many have about 35, 120 and 400 tokens."""

READING = (0, 5, 5)
"""Likewise, where more is read: documents with questions."""


def plan(
    num: int,
    dials: Sequence[float],
    tokens: tuple[int, int],
    leave: float,
    seed: int,
    lengths: tuple[int, int, int] = CHATS,
) -> list[Request]:
    """Requests with prompts of three lengths, answers of random lengths within `tokens`, and clients of which the
    share `leave` goes away in the middle."""
    draw = random.Random(seed)
    found = []
    for _ in range(num):
        ask = f"Write {draw.choice(FORMS)} about {draw.choice(TOPICS)}."
        context = " ".join((SENTENCES * 6)[: draw.choices((0, 5, 20), lengths)[0]])
        found.append(
            Request(
                prompt=f"{context}\n\n{ask}".strip(),
                compute=draw.choice(dials),
                tokens=draw.randint(*tokens),
                leaves=draw.random() < leave,
            )
        )
    return found


async def ask(
    client: httpx.AsyncClient,
    base: str,
    model: str,
    one: Request,
    fields: dict[str, Any],
    found: Answer | None = None,
) -> Answer:
    """One chat, streamed and greedy. `found` is filled as it comes, for those who do not wait for the end."""
    body = {"model": model, "messages": [{"role": "user", "content": one.prompt}], "max_tokens": one.tokens}
    body |= {"temperature": 0, "stream": True, **fields}
    found = found or Answer(200)
    found.times = []
    is_done = False
    started = time.perf_counter()
    async with client.stream("POST", f"{base}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return Answer(answer.status_code, text=(await answer.aread()).decode()[:200])
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                is_done |= line == "data: [DONE]"
                continue
            chunk = json.loads(line[6:])
            found.usage = chunk.get("usage") or found.usage
            if "error" in chunk:
                return Answer(500, text=line[:200])
            for choice in chunk.get("choices", ()):
                is_done |= choice.get("finish_reason") is not None
                if piece := choice["delta"].get("content"):
                    found.times.append(time.perf_counter() - started)
                    found.text += piece
            if one.leaves and len(found.times) >= 3:
                found.status = 499
                return found
    found.status = 200 if is_done else 0
    return found


async def closed_loop(
    base: str, model: str, requests: Sequence[Request], clients: int, fields: Any
) -> tuple[list[Answer], float]:
    """So many clients, each of which sends its next request when it has its answer. Returns answers and seconds."""
    waiting = list(enumerate(requests))[::-1]
    answers: dict[int, Answer] = {}

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            place, one = waiting.pop()
            try:
                answers[place] = await ask(client, base, model, one, fields(one))
            except httpx.HTTPError as error:
                answers[place] = Answer(0, text=repr(error))

    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    return [answers[place] for place in range(len(requests))], time.perf_counter() - started


def figures(answers: Sequence[Answer], seconds: float, num_tokens: Any) -> dict[str, Any]:
    """How a cell went.

    Args:
        num_tokens: text -> its tokens, the same count for every server.
    """
    whole = [one for one in answers if one.status == 200 and one.times]
    counts = {id(one): num_tokens(one.text) for one in answers}
    gaps = [
        (one.times[-1] - one.times[0]) / (counts[id(one)] - 1)
        for one in whole
        if one.times and len(one.times) > 1 and counts[id(one)] > 1
    ]
    return {
        "answered": sum(one.status == 200 for one in answers),
        "left": sum(one.status == 499 for one in answers),
        "refused": sum(one.status not in (200, 499) for one in answers),
        "seconds": seconds,
        "tokens": sum(counts.values()),
        "tokens_per_second": sum(counts.values()) / seconds,
        "first_token_ms": spread([one.times[0] for one in whole if one.times]),
        "ms_per_token": spread(gaps),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in ms."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {
        "p50": 1e3 * statistics.median(ordered),
        "p95": 1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    }


def listed(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Answers for a file, without the times."""
    return [{key: value for key, value in asdict(one).items() if key != "times"} for one in answers]


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[str]:
    """A server as a process of its own until the block ends. Yields its address; `wait_up` says when it answers."""
    base = f"http://127.0.0.1:{port}"
    # Without native code ours would serve all the same, ten times slower, and the figures would not be its own.
    environment = {"RHEOSTAT_KERNELS": "native"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        STARTED[base] = process
        try:
            yield base
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_up(base: str, log: Path, path: str = "/health") -> None:
    """Until a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{base}{path}", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if base in STARTED and STARTED[base].poll() is not None:
            raise SystemExit(f"{base} ended: {log.read_text().strip()[-300:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"{base} did not start: see {log}")
        time.sleep(0.5)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def ours(artifact: str, port: int, *more: str) -> list[str]:
    """The command of our server."""
    return [sys.executable, "-m", "rheostat", "serve", artifact, "--name", "dial", "--port", str(port), *more]


def owner(port: int) -> int:
    """The process that listens on a port of ours."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"\0--port\0{port}\0" in status.read_text():
                return int(status.parent.name)
    raise SystemExit(f"nobody listens on port {port}")
