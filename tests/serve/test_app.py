"""The paths there are, and how errors leave."""

from __future__ import annotations

import httpx
import pytest

from tests.serve.conftest import Live, Tiny

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
