"""OpenAI's own client against a real server."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from tests.serve.conftest import Live, Tiny

ASK: Any = {"model": "tiny", "messages": [{"role": "user", "content": "rivers"}], "temperature": 0, "max_tokens": 12}


def test_a_chat_is_the_offline_answer(client: openai.OpenAI, tiny: Tiny):
    for compute in (1.0, 0.8):
        answer = client.chat.completions.create(**ASK, extra_body={"compute": compute})
        assert answer.choices[0].message.content == tiny.offline_chat("rivers", compute, 12)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len("[user:rivers]>")
        assert answer.usage.completion_tokens <= 12
        spent = answer.usage.model_extra["compute"]
        assert spent["asked"] == compute
        assert spent["flops"] <= spent["dense_flops"]
        assert (spent["spent"] < 1) is (compute < 1)
        assert bool(spent["tokens_by_width"])
        assert spent["time_to_first_token_ms"] > 0


def test_the_dial_changes_the_answer(tiny: Tiny):
    """Else the tests here could not tell dials apart."""
    assert tiny.offline_chat("rivers", 1.0, 12) != tiny.offline_chat("rivers", tiny.adapted.dial.low, 12)


def test_a_stream_carries_the_same_text_and_the_bill(client: openai.OpenAI, tiny: Tiny):
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(**ASK, stream=True, stream_options=options, extra_body={"compute": 0.8})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == tiny.offline_chat("rivers", 0.8, 12)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_extra["compute"]["spent"] < 1
    widths = [chunk.choices[0].model_extra["compute"]["width"] for chunk in chunks[1:-2]]
    assert min(widths) < 1


@pytest.mark.parametrize(
    "how",
    [
        {"extra_body": {"compute": 0.8}},
        {"extra_body": {"vllm_xargs": {"compute": 0.8}}},
        {"extra_body": {"compute": {"prefill": 0.8, "decode": 0.8}}},
        {"model": "tiny@0.8"},
        {"model": "tiny@0.9", "extra_body": {"compute": 0.8}},
    ],
)
def test_each_way_to_set_the_dial(client: openai.OpenAI, tiny: Tiny, how: dict[str, Any]):
    answer = client.chat.completions.create(**ASK | how)
    assert answer.usage.model_extra["compute"]["asked"] == 0.8
    assert answer.choices[0].message.content == tiny.offline_chat("rivers", 0.8, 12)


def test_n_samples_differ_and_a_seed_repeats_them(client: openai.OpenAI):
    ask = ASK | {"temperature": 1.0, "n": 3, "seed": 5}
    first, second = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    assert texts != [choice.message.content for choice in client.chat.completions.create(**ask | {"seed": 6}).choices]


def test_top_p_close_to_zero_is_greedy(client: openai.OpenAI, tiny: Tiny):
    answer = client.chat.completions.create(**ASK | {"temperature": 1.0, "top_p": 1e-6})
    assert answer.choices[0].message.content == tiny.offline_chat("rivers", 1.0, 12)


def test_logprobs(client: openai.OpenAI):
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)  # greedy takes the best
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1 + 1e-5
    plain = client.completions.create(model="tiny", prompt="rivers", temperature=0, max_tokens=4, logprobs=2)
    assert len(plain.choices[0].logprobs.token_logprobs) == 4


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, tiny: Tiny):
    whole = tiny.offline("rivers", 1.0, 24)
    stop = whole[9:11]
    place = whole.find(stop)
    answer = client.completions.create(model="tiny", prompt="rivers", temperature=0, max_tokens=24, stop=[stop, "@@@"])
    assert answer.choices[0].text == whole[:place]
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.completions.create(
        model="tiny", prompt="rivers", temperature=0, max_tokens=24, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:place]


def test_several_prompts_and_token_ids(client: openai.OpenAI, tiny: Tiny):
    answer = client.completions.create(model="tiny", prompt=["one", "twelve"], temperature=0, max_tokens=6, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [tiny.offline(prompt, 1.0, 6) for prompt in ("one", "one", "twelve", "twelve")]
    assert [choice.text for choice in answer.choices] == expected
    ids = tiny.tokenizer("one")["input_ids"]
    assert (
        client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=6).choices[0].text == expected[0]
    )


def test_models(client: openai.OpenAI):
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny"
    assert "tiny@0.8" in names
    assert client.models.retrieve("tiny@0.77").id == "tiny@0.77"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "no model 'gpt-4'"),
        ({"model": "tiny@fast"}, openai.NotFoundError, "no model 'tiny@fast'"),
        ({"model": "tiny@0.01"}, openai.BadRequestError, "must be between"),
        ({"extra_body": {"compute": 0.01}}, openai.BadRequestError, "compute=0.01: must be between"),
        ({"extra_body": {"compute": 7}}, openai.BadRequestError, "compute"),
        ({"extra_body": {"compute": "much"}}, openai.BadRequestError, "compute"),
        ({"extra_body": {"vllm_xargs": {"compute": []}}}, openai.BadRequestError, "compute"),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens=5000: must be at most"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, openai.BadRequestError, "must be at most 255 tokens"),
        ({"n": 100}, openai.BadRequestError, "n=100: must be at most 8"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools: must be left out"),
        ({"stop": ["x"] * 99}, openai.BadRequestError, "stop: must be at most"),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs"),
    ],
)
def test_errors_say_what_is_allowed(client: openai.OpenAI, change: dict[str, Any], error: type, message: str):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**ASK | change)
    assert message in caught.value.body["message"]
    assert caught.value.body["type"]


def test_health_and_metrics(client: openai.OpenAI, running: Live):
    import httpx

    client.chat.completions.create(**ASK, extra_body={"compute": 0.8})
    assert httpx.get(f"{running.base}/health").json()["status"] == "ok"
    text = httpx.get(f"{running.base}/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "compute_fraction_bucket",
        "flops_total",
    ):
        assert f"rheostat_{name}{{" in text, name
