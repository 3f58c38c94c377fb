"""Whatever the OpenAPI description allows, and much that it does not: never a 5xx, and errors of the known shape."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from tests.serve.conftest import Tiny, live

pytestmark = pytest.mark.slow


def test_fuzz_of_the_description(tiny: Tiny):
    with live(tiny, max_new_tokens=8, new_tokens=4) as server:
        description = httpx.get(f"{server.base}/openapi.json").json()
        assert "/v1/chat/completions" in description["paths"]
        shorten(description)
        schema = schemathesis.openapi.from_dict(description)
        seen: dict[str, set[int]] = {}

        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=40,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @schemathesis_given(operation)
            def one(case: Any) -> None:
                answer = case.call(base_url=server.base, timeout=30)
                seen.setdefault(case.operation.path, set()).add(answer.status_code)
                assert answer.status_code < 500, (case.body, answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"]

            one()
        server.wait_idle()
        assert server.engine.is_alive
        assert {200, 400} <= seen["/v1/completions"] | seen["/v1/chat/completions"]


def schemathesis_given(operation: Any) -> Any:
    """Cases for one operation, well-formed and not."""
    from hypothesis import given
    from hypothesis import strategies as st

    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    return given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))


def shorten(description: dict[str, Any]) -> None:
    """Ask for the one model there is, so that bodies get past the first check."""
    for name in ("ChatRequest", "CompletionRequest"):
        description["components"]["schemas"][name]["properties"]["model"] = {"enum": ["tiny", "tiny@0.8"]}
