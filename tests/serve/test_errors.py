"""Errors as OpenAI's API has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rheostat.serve.errors import Refusal, error_body, failure, unusable
from rheostat.serve.schema import ChatRequest, CompletionRequest


def test_a_refusal_says_what_kind_it_is_and_which_field():
    body = Refusal(429, "full", param="n", code="rate_limit_exceeded").body
    assert body["error"] == {
        "message": "full",
        "type": "rate_limit_error",
        "param": "n",
        "code": "rate_limit_exceeded",
    }


@pytest.mark.parametrize(("status", "kind"), [(418, "invalid_request_error"), (599, "server_error")])
def test_a_status_without_a_kind_of_its_own(status: int, kind: str):
    assert error_body(status, "x")["error"]["type"] == kind


def test_memory_is_a_503_and_anything_else_a_500():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)  # PyTorch's own words for it
    assert failure(caught.value)[0] == 503
    assert failure(MemoryError())[0] == 503
    assert failure(FloatingPointError("logits that are not numbers"))[0] == 500
    assert "logits" not in failure(FloatingPointError("logits that are not numbers"))[1]  # nothing of the inside


COMPUTE = "must be a number in (0, 1], or an object with the keys prefill and decode"


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        ({"compute": 2}, f"compute=2: {COMPUTE}", "compute"),
        ({"compute": "fast"}, f"compute='fast': {COMPUTE}", "compute"),
        ({"compute": [0.7]}, f"compute: {COMPUTE}", "compute"),
        (
            {"compute": {"prefil": 1}},
            f"compute.prefil=1: must be left out, there is no such key (compute is {COMPUTE[8:]})",
            "compute.prefil",
        ),
        ({"compute": {"decode": 2}}, "compute.decode=2: must be less than or equal to 1", "compute.decode"),
        ({"prompt": [1, "x"]}, "prompt: must be a string, token ids, or a list of either", "prompt"),
        ({"stop": 5}, "stop=5: must be a string, or a list of strings", "stop"),
        ({"max_tokens": 0, "top_p": 7}, "max_tokens=0: must be greater than or equal to 1", "max_tokens"),
        ({"stream_options": 3}, "stream_options=3: must be an object", "stream_options"),
        ({"model": "x" * 300}, "model: must have at most 256 characters", "model"),
    ],
)
def test_a_field_of_another_form_is_named_as_it_was_sent(change: dict[str, Any], message: str, param: str):
    body = {"model": "tiny", "prompt": "x"} | change
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(body, from_attributes=True)  # as FastAPI does
    refusal = unusable(as_fastapi(caught.value), body)
    assert (refusal.status, refusal.message, refusal.body["error"]["param"]) == (400, message, param)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages: must be given"),
        ([], "messages: must have at least 1 item after validation, not 0"),
        ([{"role": "user", "content": 5}], "messages.0.content=5: must be a string, or a list of parts"),
        ([{"content": "x"}], "messages.0.role: must be given"),
    ],
)
def test_a_message_of_another_form_is_named_by_its_place(messages: Any, message: str):
    body = {"model": "tiny"} | ({} if messages is None else {"messages": messages})
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    assert unusable(as_fastapi(caught.value), body).message == message


@pytest.mark.parametrize(
    ("kind", "place", "body", "message"),
    [
        ("json_invalid", ("body", 5), "{", "the body must be JSON: Expecting value, at character 5"),
        ("model_attributes_type", ("body",), b'{"a": 1}', "with the header Content-Type: application/json"),
        ("model_attributes_type", ("body",), [1, 2], "the body must be a JSON object"),
        ("missing", ("body",), None, "the body must be a JSON object"),
    ],
)
def test_a_body_that_is_no_object_names_no_field(kind: str, place: tuple[Any, ...], body: Any, message: str):
    refusal = unusable([{"type": kind, "loc": place, "msg": "?", "ctx": {"error": "Expecting value"}}], body)
    assert refusal.message.endswith(message)
    assert refusal.body["error"]["param"] is None


def as_fastapi(error: ValidationError) -> list[Any]:
    """Its errors as FastAPI hands them on."""
    return [one | {"loc": ("body", *one["loc"])} for one in error.errors()]


def test_an_error_can_be_sent_whatever_it_quotes():
    assert b"\\ud83d" in Refusal(400, "the key \ud83d").content
