"""Errors as OpenAI's API has them."""

from __future__ import annotations

import pytest
import torch

from rheostat.serve.errors import Refusal, error_body, failure


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
