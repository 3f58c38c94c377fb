"""What goes wrong on a network, against a real server: a clear answer, and nobody else notices."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import rheostat
from rheostat.serve.scheduler import Limits
from tests.serve.conftest import Live, Tiny, live, until

LONG: Any = {"model": "tiny", "prompt": "rivers", "temperature": 0, "max_tokens": 200, "stream": True}
SHORT: Any = {"model": "tiny", "prompt": "rivers", "temperature": 0, "max_tokens": 5}


@pytest.fixture(scope="module")
def strict(tiny: Tiny) -> Iterator[Live]:
    """A server with a key and small limits."""
    with live(tiny, api_key="secret", max_body_bytes=2000, limits=Limits(rows=1, queue=1)) as one:
        yield one


KEY = {"authorization": "Bearer secret"}


def post(server: Live, body: Any, **settings: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | settings.pop("headers", KEY)
    return httpx.post(f"{server.base}/v1/completions", content=content, headers=headers, timeout=30, **settings)


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": "tiny", "prompt": ', "JSON"),
        (b"[1, 2]", "a JSON object"),
        (b"", "a JSON object"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', "body"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "Unicode"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "prompt": []}', "at least one token"),
        (b'{"model": "tiny", "prompt": [99999]}', "token ids must be from 0"),
        (b'{"model": "tiny", "prompt": ""}', "at least one token"),
        (b"[" * 1500, ""),
    ],
)
def test_bodies_that_cannot_be_used(strict: Live, content: bytes, message: str):
    assert message in refusal(post(strict, content), 400)


def test_a_body_that_is_too_large_is_not_read(strict: Live):
    assert "at most 2000 bytes" in refusal(post(strict, SHORT | {"prompt": "x" * 3000}), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 100

    answer = httpx.post(f"{strict.base}/v1/completions", content=chunks(), headers=KEY, timeout=30)
    assert "at most 2000 bytes" in refusal(answer, 413)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}])
def test_a_wrong_key(strict: Live, headers: dict[str, str]):
    assert "key" in refusal(post(strict, SHORT, headers=headers), 401)
    assert httpx.get(f"{strict.base}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{strict.base}/health", headers=headers).status_code == 200


def test_paths_and_verbs_that_are_not_there(strict: Live):
    refusal(httpx.get(f"{strict.base}/v1/engines", headers=KEY), 404)
    refusal(httpx.get(f"{strict.base}/v1/completions", headers=KEY), 405)


def test_request_ids_come_back_and_cannot_carry_anything(strict: Live):
    assert post(strict, SHORT, headers=KEY | {"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert post(strict, SHORT, headers=KEY | {"x-request-id": "a b\x01"}).headers["x-request-id"] != "a b\x01"


def test_other_origins_get_no_leave(strict: Live, tiny: Tiny):
    origin = {"origin": "https://elsewhere.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{strict.base}/health", headers=origin).headers
    with live(tiny, origins=("https://elsewhere.example",)) as server:
        headers = httpx.get(f"{server.base}/health", headers=origin).headers
        assert headers["access-control-allow-origin"] == "https://elsewhere.example"


def test_a_full_queue_says_when_to_come_back(strict: Live):
    with asking(strict, LONG):
        until(lambda: strict.engine.scheduler.num_rows == 1)
        with asking(strict, LONG):
            until(lambda: len(strict.engine.scheduler.waiting) == 1)
            answer = post(strict, SHORT)
    assert "queue is full" in refusal(answer, 429)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    strict.wait_idle()
    assert post(strict, SHORT).status_code == 200
    assert 'rheostat_http_refusals_total{model_name="tiny",status="429"} 1.0' in strict.metrics.text().decode()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_vanishes_frees_its_place(strict: Live, streams: bool):
    before = count(strict, "cancelled")
    with asking(strict, LONG | {"stream": streams}):
        until(lambda: strict.engine.scheduler.num_rows == 1)
    strict.wait_idle(5)
    until(lambda: count(strict, "cancelled") == before + 1)


@contextlib.contextmanager
def asking(server: Live, body: Any) -> Iterator[None]:
    """Send a request, and vanish without having read the answer."""
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines += ["Authorization: Bearer secret", f"Content-Length: {len(content)}"]
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        yield


def count(server: Live, reason: str) -> float:
    value = server.metrics.registry.get_sample_value
    return value("rheostat_request_success_total", {"model_name": "tiny", "finished_reason": reason}) or 0.0


def test_a_slow_reader_holds_up_nobody(tiny: Tiny):
    with live(tiny) as server, httpx.Client(timeout=30) as client:
        ask = LONG | {"n": 4, "logprobs": 20}
        with client.stream("POST", f"{server.base}/v1/completions", json=ask) as slow:
            parts = slow.iter_raw(1)
            next(parts)  # and then it looks away
            answer = post(server, SHORT | {"compute": 0.8})
            assert answer.json()["choices"][0]["text"] == tiny.offline("rivers", 0.8, 5)
            server.wait_idle()  # the engine has finished what nobody reads
            lines = b"".join(parts).decode().splitlines()
        assert lines[-2] == "data: [DONE]"


def test_the_time_limit(tiny: Tiny):
    with live(tiny, request_seconds=0.005) as server:
        assert "time limit" in refusal(post(server, LONG | {"stream": False}), 504)
        answer = post(server, LONG)
        assert '"type":"timeout_error"' in answer.text
        server.wait_idle()


@pytest.mark.parametrize("streams", [True, False])
def test_an_overload_is_a_429_with_advice_before_anything_is_sent(tiny: Tiny, streams: bool):
    with live(tiny, limits=Limits(rows=1, queue_seconds=0.002)) as server, asking(server, LONG):
        until(lambda: server.engine.scheduler.num_rows == 1)
        answer = post(server, SHORT | {"stream": streams})
        assert "overloaded" in refusal(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1


def test_a_model_file_that_is_removed_while_it_is_served(tiny: Tiny, tmp_path: Path):
    rheostat.save(tiny.adapted, tiny.tokenizer, tmp_path / "gone")
    adapted, tokenizer = rheostat.load(str(tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")  # before the first request makes what it needs of the weights
    with live(Tiny(adapted, tokenizer)) as server:
        answer = post(server, SHORT | {"compute": 0.8})
        assert answer.json()["choices"][0]["text"] == tiny.offline("rivers", 0.8, 5)


@pytest.mark.slow
def test_memory_is_flat_over_hundreds_of_requests(tiny: Tiny):
    with live(tiny, limits=Limits(rows=8, queue=64)) as server, httpx.Client(timeout=60) as client:

        def one(place: int) -> None:
            body = {"model": "tiny", "prompt": "water " * (place % 9 + 1), "compute": (1.0, 0.8)[place % 2]}
            body |= {"max_tokens": 4 + place % 24, "stream": place % 3 == 0, "logprobs": 3}
            assert client.post(f"{server.base}/v1/completions", json=body).status_code == 200

        sizes = []
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            for _ in range(4):
                list(pool.map(one, range(200)))
                gc.collect()
                sizes.append(resident_bytes())
        assert sizes[-1] - sizes[0] < 8 << 20, sizes


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_template_that_refuses_is_the_clients_fault(running: Live, tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    body = {"model": "tiny", "messages": [{"role": "system", "content": "x"}]}
    answer = httpx.post(f"{running.base}/v1/chat/completions", json=body)
    assert "no system role" in refusal(answer, 400)


def test_32_clients_with_mixed_dials_lengths_and_leaves_get_their_own_answers(tiny: Tiny):
    computes = [1.0, 0.9, 0.8, 0.75]
    draw = random.Random(0)
    asks = [
        (f"{'water ' * draw.randint(0, 4)}{k % 7}", draw.choice(computes), draw.randint(1, 8), k % 5 == 4)
        for k in range(48)
    ]
    expected = {ask[:3]: tiny.offline(*ask[:3]) for ask in {ask[:3]: ask for ask in asks if not ask[3]}.values()}
    with live(tiny, limits=Limits(rows=8, queue=64)) as server, httpx.Client(timeout=60) as client:

        def one(ask: tuple[str, float, int, bool]) -> str | None:
            prompt, compute, new, leaves = ask
            body = {"model": "tiny", "prompt": prompt, "temperature": 0, "compute": compute, "stream": True}
            text, is_done = "", False
            url = f"{server.base}/v1/completions"
            with client.stream("POST", url, json=body | {"max_tokens": 60 if leaves else new}) as answer:
                for line in answer.iter_lines():
                    if leaves and text:
                        return None
                    if line == "data: [DONE]":
                        is_done = True
                    elif line:
                        text += json.loads(line[6:])["choices"][0]["text"]
            assert is_done
            return text

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(one, asks))
        for ask, text in zip(asks, answers, strict=True):
            assert text == (None if ask[3] else expected[ask[:3]]), ask
        server.wait_idle()
        assert server.engine.backend.cache_bytes < 1 << 20


# -- the command, as a process of its own


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an artifact."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    rheostat.save(tiny.adapted, tiny.tokenizer, path)
    return path


@pytest.mark.slow
def test_sigterm_finishes_what_is_in_flight(folder: Path, tiny: Tiny, tmp_path: Path):
    command = [sys.executable, "-m", "rheostat", "serve", str(folder), "--port", "0"]
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as process:
        try:
            base = address(log, process)
            until(lambda: is_up(base) or process.poll() is not None, 120)
            with httpx.stream("POST", f"{base}/v1/completions", json=LONG, timeout=60) as answer:
                parts = answer.iter_text()
                text = next(parts)
                os.kill(process.pid, signal.SIGTERM)
                text += "".join(parts)
            assert text.splitlines()[-2] == "data: [DONE]"
            pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == tiny.offline("rivers", 1.0, 200)
            assert process.wait(30) == 0
            assert not is_up(base)
            _, err = process.communicate()
            assert f"{base}/v1" in log.read_text()
            logs = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
            assert any(one.get("path") == "/v1/completions" and one["status"] == 200 for one in logs)
            assert "rivers" not in err
        finally:
            process.kill()


LIMITED = """
import resource, sys
from rheostat.__main__ import main
before = resource.getrlimit(resource.RLIMIT_AS)

def limit():
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20), before[1]))

from rheostat.serve import server
serve = server.Server.serve_until_told

def limited(self, listener):
    self.engine.backend.runtime.prepare()
    limit()
    serve(self, listener)

server.Server.serve_until_told = limited
main()
"""


@pytest.mark.slow
@pytest.mark.model
def test_a_memory_limit_is_a_clear_answer_and_the_server_stays(tmp_path: Path):
    flags = ["--port", "0", "--name", "dense", "--rows", "32", "--cache-tokens", "1000000"]
    command = [sys.executable, "-c", LIMITED, "serve", "smollm2-135m", *flags]
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            base = address(log, process)
            until(lambda: is_up(base) or process.poll() is not None, 180)
            short: Any = {"model": "dense", "prompt": "The river", "max_tokens": 8, "temperature": 0}
            before = httpx.post(f"{base}/v1/completions", json=short, timeout=120).json()["choices"][0]["text"]
            large = short | {"prompt": [5] * 2000, "n": 32}  # keys and values of 3 GB
            answer = httpx.post(f"{base}/v1/completions", json=large, timeout=300)
            assert "not enough memory" in refusal(answer, 503)
            after = httpx.post(f"{base}/v1/completions", json=short, timeout=120).json()["choices"][0]["text"]
            assert after == before
        finally:
            process.kill()


def address(log: Path, process: subprocess.Popen[Any]) -> str:
    """Of a server that took a free port, from what it prints: a port that is probed first may be somebody's by then."""
    until(lambda: "/v1\n" in log.read_text() or process.poll() is not None, 180)
    found = re.search(r"(http://\S+)/v1$", log.read_text(), re.MULTILINE)
    assert found, "it ended before it served"
    return found[1]


def is_up(base: str) -> bool:
    time.sleep(0.1)
    try:
        return httpx.get(f"{base}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
