"""The paths there are, and how errors leave."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from rheostat.serve.app import create_app
from rheostat.serve.metrics import Metrics
from rheostat.serve.service import Rules, Service
from tests.serve.conftest import Live, Tiny

ORIGIN = {"origin": "https://elsewhere.example"}

PATHS = {
    "/": {"get"},
    "/dial": {"get"},
    "/health": {"get"},
    "/metrics": {"get"},
    "/v1/models": {"get"},
    "/v1/models/{name}": {"get"},
    "/v1/completions": {"post"},
    "/v1/chat/completions": {"post"},
}


def test_the_description_has_every_path_and_the_shape_of_errors(running: Live):
    found = httpx.get(f"{running.base}/openapi.json").json()
    assert {path: set(verbs) for path, verbs in found["paths"].items()} == PATHS
    for path in ("/v1/completions", "/v1/chat/completions"):
        errors = {status: one for status, one in found["paths"][path]["post"]["responses"].items() if status >= "400"}
        assert {"400", "401", "408", "413", "429", "500", "503", "504"} <= set(errors)
        for status in ("400", "429", "503"):
            assert errors[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")


def test_what_the_page_is_told_of_the_dial(running: Live, tiny: Tiny):
    found = httpx.get(f"{running.base}/dial").json()
    assert found["low"] == pytest.approx(tiny.adapted.dial.low)
    assert (found["model"], found["num_layers"], found["has_chat"], found["needs_key"]) == ("tiny", 3, True, False)
    assert found["curves"] == []


def test_the_field_that_is_wrong_is_named(running: Live):
    ask = {"model": "tiny", "prompt": "x"}
    for change, name in (({"compute": 0.01}, "compute"), ({"top_p": 7}, "top_p"), ({"model": "other"}, "model")):
        error = httpx.post(f"{running.base}/v1/completions", json=ask | change).json()["error"]
        assert error["param"] == name, error


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(running: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(running.engine), "state", lambda self: 1 / 0)
    answer = httpx.get(f"{running.base}/health")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed at this request"


def ask(path: str, *, method: str = "GET", is_broken: bool = False, **request: Any) -> httpx.Response:
    """The answer of a server with a key and one other origin, which has no model and needs none for this."""
    engine = SimpleNamespace(
        is_alive=True, scheduler=SimpleNamespace(is_draining=False), state=lambda: 1 / 0 if is_broken else {"rows": 0}
    )
    rules = Rules(name="tiny", api_key="secret", max_body_bytes=100, origins=(ORIGIN["origin"],))
    nothing: Any = None
    unwatched: Any = engine
    app = create_app(Service(nothing, nothing, unwatched, rules), Metrics("tiny"))

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **request)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (401, {"path": "/v1/models"}),
        (413, {"path": "/v1/completions", "method": "POST", "content": b"x" * 101}),
        (500, {"path": "/health", "is_broken": True}),
        (200, {"path": "/health"}),
    ],
)
def test_pages_of_an_allowed_origin_may_read_refusals_too(status: int, request_: dict[str, Any]):
    key = {} if status == 401 else {"authorization": "Bearer secret"}
    answer = ask(**request_, headers=ORIGIN | key)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] in ("*", ORIGIN["origin"])
    assert answer.headers["access-control-expose-headers"] == "x-request-id, retry-after"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/", "/health"])
def test_heads_can_be_asked_for(path: str):
    answer = ask(path, method="HEAD")
    assert (answer.status_code, answer.headers["content-type"]) == (200, ask(path).headers["content-type"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": "gpt-4", "prompt": "x"}', "no model 'gpt-4' here: ask for 'tiny', or for 'tiny@x' at compute x"),
        (b'{"model": "tiny", "compute": {"\\ud83d": 1}, "prompt": "x"}', "compute: must be a number in (0, 1]"),
        (b'{"model": "tiny", "suffix": "\\ud83d", "prompt": "x"}', "suffix: must be left out"),
        (b'{"model": "tiny", ', "the body must be JSON"),
    ],
)
def test_what_was_sent_is_quoted_in_errors_that_help(content: bytes, message: str):
    headers = {"authorization": "Bearer secret", "content-type": "application/json"}
    answer = ask("/v1/completions", method="POST", content=content, headers=headers)
    assert answer.status_code == (404 if b"gpt-4" in content else 400)
    assert message in answer.json()["error"]["message"]
