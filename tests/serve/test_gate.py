"""The gate before an app that is a few lines of ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from rheostat.serve.gate import Gate


class Inner:
    """Answers with the body it got, in two pieces; or does what it is told."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.bodies, self.sent_first = seconds, [], asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive()).get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        self.sent_first.set()
        await asyncio.sleep(self.seconds)
        await send({"type": "http.response.body", "body": b"last"})


async def ask(
    gate: Gate,
    *,
    path: str = "/v1/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    parts: Sequence[bytes] = (b"{}",),
    stalls: bool = False,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if not stalls:
        messages[-1]["more_body"] = False
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await gate({"type": "http", "path": path, "method": method, "headers": pairs}, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(one["body"] for one in sent[1:])


def gate(inner: Any, **settings: Any) -> Gate:
    defaults: dict[str, Any] = {"api_key": None, "max_body_bytes": 10, "request_seconds": 5.0}
    return Gate(inner, **defaults | settings)


def message(body: bytes) -> str:
    return json.loads(body)["error"]["message"]


def test_a_body_reaches_the_app_whole_and_the_answer_has_an_id():
    inner = Inner()
    status, headers, body = asyncio.run(ask(gate(inner), parts=(b"one", b"two"), headers={"x-request-id": "mine"}))
    assert (status, body, inner.bodies) == (200, b"firstlast", [b"onetwo"])
    assert headers["x-request-id"] == "mine"


@pytest.mark.parametrize("headers", [{"content-length": "11"}, {}, {"content-length": "nonsense"}])
def test_a_body_over_the_limit_never_reaches_the_app(headers: dict[str, str]):
    inner, refused = Inner(), []
    one = gate(inner, on_refusal=refused.append)
    status, found, body = asyncio.run(ask(one, parts=(b"x" * 6, b"x" * 6), headers=headers))
    assert (status, found["connection"], refused) == (413, "close", [413])
    assert "at most 10 bytes" in message(body)
    assert inner.bodies == []


def test_a_body_that_does_not_come():
    status, _, body = asyncio.run(ask(gate(Inner(), body_seconds=0.02), stalls=True))
    assert (status, message(body)) == (408, "the body did not come in time")


@pytest.mark.parametrize(
    ("given", "status"),
    [("Bearer secret", 200), ("bearer  secret", 200), ("Bearer wrong", 401), ("secret", 401), ("", 401)],
)
def test_the_key(given: str, status: int):
    found = asyncio.run(ask(gate(Inner(), api_key="secret"), headers={"authorization": given}))
    assert found[0] == status
    assert ("www-authenticate" in found[1]) is (status == 401)


def test_only_the_api_needs_the_key_and_a_browsers_question_does_not():
    one = gate(Inner(), api_key="secret")
    assert asyncio.run(ask(one, path="/health", method="GET"))[0] == 200
    assert asyncio.run(ask(one, method="OPTIONS"))[0] == 200
    assert asyncio.run(ask(one, path="/v1/models", method="GET"))[0] == 401


def test_an_answer_that_has_not_begun_in_time_is_a_504(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rheostat.serve.gate.GRACE", 0.0)

    async def never(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    status, _, body = asyncio.run(ask(gate(never, request_seconds=0.02)))
    assert (status, message(body)) == (504, "the time limit of this server has passed")


def test_an_answer_that_has_begun_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rheostat.serve.gate.GRACE", 0.0)
    with pytest.raises(TimeoutError):
        asyncio.run(ask(gate(Inner(seconds=60), request_seconds=0.02)))


def test_pieces_pass_at_once():
    async def first_before_last() -> None:
        inner = Inner(seconds=0.2)
        asking = asyncio.create_task(ask(gate(inner)))
        await asyncio.wait_for(inner.sent_first.wait(), 0.15)
        assert not asking.done()
        assert (await asking)[2] == b"firstlast"

    asyncio.run(first_before_last())


def test_what_nobody_foresaw_has_an_id_and_is_counted():
    refused: list[int] = []

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/health", "method": "GET", "headers": []}
    with pytest.raises(ZeroDivisionError):  # for the server's log
        asyncio.run(gate(broken, on_refusal=refused.append)(scope, None, send))
    assert (sent[0]["status"], refused) == (500, [500])
    assert "x-request-id" in {name.decode() for name, _ in sent[0]["headers"]}
    assert message(sent[1]["body"]) == "the server failed at this request"
