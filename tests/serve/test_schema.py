"""Fields that are refused; whatever the description allows, and much that it does not: never a 5xx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from rheostat.errors import SettingError
from rheostat.serve.schema import REFUSED, CompletionRequest
from tests.serve.conftest import Tiny, live

ASK: dict[str, Any] = {"model": "tiny", "prompt": "x"}

REFUSED_HERE = {
    "repetition_penalty": 1.2,
    "min_p": 0.1,
    "min_tokens": 8,
    "stop_token_ids": [7],
    "guided_regex": "[0-9]+",
    "guided_json": {"type": "object"},
    "structured_outputs": {"choice": ["a", "b"]},
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.mark.parametrize("name", REFUSED_HERE)
def test_what_would_change_the_answer_is_refused_and_not_ignored(name: str):
    with pytest.raises(SettingError, match=f"^{name}: must be left out"):
        CompletionRequest.model_validate(ASK | {name: REFUSED_HERE[name]}).check_refused()
    for neutral in (None, REFUSED[name]):
        CompletionRequest.model_validate(ASK | {name: neutral}).check_refused()


def test_half_a_surrogate_pair_in_a_refused_field_is_shown_as_text():
    with pytest.raises(SettingError) as caught:
        CompletionRequest.model_validate(ASK | {"suffix": "\ud83d"}).check_refused()
    assert str(caught.value).encode().endswith(b"(got '\\ud83d')")


def test_the_page_names_every_field_that_is_refused():
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    assert [name for name in REFUSED if f"`{name}`" not in page] == []


@pytest.mark.slow
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
