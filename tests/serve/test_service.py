"""Bodies to jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rheostat.errors import SettingError
from rheostat.serve.backend import make_backend
from rheostat.serve.engine import Engine
from rheostat.serve.jobs import Job
from rheostat.serve.schema import ChatRequest, CompletionRequest
from rheostat.serve.service import Rules, Service, UnknownModel
from tests.serve.conftest import Tiny


@pytest.fixture(scope="module")
def service(tiny: Tiny) -> Service:
    """An engine that is never started."""
    engine = Engine(tiny.adapted, tiny.tokenizer, make_backend(tiny.adapted))
    return Service(tiny.adapted, tiny.tokenizer, engine, Rules(name="tiny", compute=0.9, compute_min=0.75))


def job(service: Service, **fields: Any) -> Job:
    """The one job of a completion."""
    (found,) = service.jobs(CompletionRequest(**{"model": "tiny", "prompt": "water"} | fields), "id")
    return found


@pytest.mark.parametrize(
    ("fields", "prefill", "decode"),
    [
        ({}, 0.9, 0.9),
        ({"model": "tiny@0.8"}, 0.8, 0.8),
        ({"model": "tiny@0.8", "vllm_xargs": {"compute": 0.85}}, 0.85, 0.85),
        ({"model": "tiny@0.8", "vllm_xargs": {"compute": "0.85"}, "compute": 1.0}, 1.0, 1.0),
        ({"compute": {"prefill": 0.8}}, 0.8, 1.0),
        ({"vllm_xargs": {"compute": {"prefill": 0.8, "decode": 0.9}}}, 0.8, 0.9),
    ],
)
def test_the_strongest_wish_for_the_dial_holds(service: Service, fields: Any, prefill: float, decode: float):
    found = job(service, **fields)
    assert (found.prefill_compute, found.compute) == (prefill, decode)


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({}, 0.75),
        ({"compute_min": 0.8}, 0.8),
        ({"vllm_xargs": {"compute_min": 0.85}}, 0.85),
        ({"compute": 0.7}, 0.7),  # the server's own least does not raise a request
    ],
)
def test_how_far_a_busy_server_may_go(service: Service, fields: Any, least: float):
    assert job(service, **fields).compute_min == least


@pytest.mark.parametrize(
    ("fields", "is_held"),
    [
        ({}, True),
        ({"hold": False}, False),
        ({"vllm_xargs": {"hold": False}}, False),
        ({"hold": True, "vllm_xargs": {"hold": False}}, True),
    ],
)
def test_requests_are_held_unless_they_say_not(service: Service, fields: Any, is_held: bool):
    assert job(service, **fields).is_held == is_held
    free = replace(service, rules=replace(service.rules, hold=False))
    assert job(free, **fields).is_held == (is_held if fields else False)


def test_a_wish_to_hold_that_is_none(service: Service):
    with pytest.raises(SettingError, match="hold='maybe': must be true or false"):
        job(service, vllm_xargs={"hold": "maybe"})


def test_lengths_are_those_asked_for_within_the_rules(service: Service):
    assert job(service).max_new_tokens == 251  # the model reads 256
    assert job(service, max_tokens=7).max_new_tokens == 7
    with pytest.raises(SettingError, match="max_tokens=252: must be at most 251"):
        job(service, max_tokens=252)


def test_each_prompt_is_a_job_with_seeds_of_its_own(service: Service):
    body = CompletionRequest(model="tiny", prompt=["a", "bc"], n=3, seed=10)
    jobs = service.jobs(body, "id")
    assert [(one.id, len(one.prompt), one.n, one.seed) for one in jobs] == [("id-0", 1, 3, 10), ("id-1", 2, 3, 13)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["x"] * 65}, "at most 64 prompts"),
        ({"prompt": ["x"] * 40, "n": 4}, "n: must be at most 3"),
        ({"vllm_xargs": {"compute": True}}, "compute='True'"),
        ({"vllm_xargs": {"compute": {"prefil": 0.8}}}, "prefil"),
        ({"vllm_xargs": {"compute": "fast"}}, "compute='fast'"),
        ({"vllm_xargs": {"compute_min": 2}}, "compute_min=2"),
        ({"n": 9}, "n=9: must be at most 8"),
    ],
)
def test_what_is_not_allowed_is_named(service: Service, fields: Any, message: str):
    with pytest.raises(SettingError, match="must be") as caught:
        service.jobs(CompletionRequest(**{"model": "tiny", "prompt": "x"} | fields), "id")
    assert message in str(caught.value)


def test_models_it_answers_to(service: Service, tiny: Tiny):
    assert service.models()[:3] == ["tiny", "tiny@0.9", "tiny@0.8"]
    assert all(float(name[5:]) >= tiny.adapted.dial.low for name in service.models()[1:])
    for name in ("other", "tiny@", "tiny@much", "other@0.8"):
        with pytest.raises(UnknownModel):
            service.virtual(name)


def test_a_chat_goes_through_the_template(service: Service, tiny: Tiny):
    parts: Any = [{"type": "text", "text": "ri"}, {"type": "text", "text": "vers"}]
    body = ChatRequest(
        model="tiny", messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    )  # type: ignore[list-item]
    (found,) = service.jobs(body, "id")
    assert tiny.tokenizer.decode(found.prompt) == "[system:be][user:rivers]>"
