"""Events in, bodies out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rheostat.serve.answers import Chat, Choice, Plain, Shape, total
from rheostat.serve.jobs import RowDone, Token, TokenProbability
from tests.serve.test_deploy import BILL

TOKENS = [
    Token(row=0, text="a", token_id=1, width=0.5, layers=[0.25, 0.75], compute=0.8, logprob=-0.5),
    Token(row=0, text="\ufffd", token_id=2, width=1.0, logprob=-1.0, top=(TokenProbability(3, -1.5),)),
]
WORDS = {1: "a", 2: "\ufffd", 3: "c"}


def shape(kind: type[Shape], **settings: Any) -> Shape:
    return kind(id="id", model="m", decode=WORDS.__getitem__, **settings)


def test_a_chunk_carries_what_the_token_cost_and_layers_only_where_asked():
    plain = shape(Plain).chunk(3, TOKENS[0])["choices"][0]
    assert plain == {"index": 3, "text": "a", "finish_reason": None, "compute": {"width": 0.5, "asked": 0.8}}
    assert shape(Plain, wants_layers=True).chunk(0, TOKENS[0])["choices"][0]["compute"]["layers"] == [0.25, 0.75]


def test_a_chat_begins_with_roles_and_ends_without_text():
    chat = shape(Chat)
    first = chat.chunks_first(2)
    assert [one["choices"][0]["index"] for one in first] == [0, 1]
    assert all(one["choices"][0]["delta"]["role"] == "assistant" for one in first)
    last = chat.chunk_last(1, RowDone(0, "stop", ""))["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert chat.chunk_last(1, RowDone(0, "length", "rest"))["choices"][0]["delta"] == {"content": "rest"}


def test_probabilities_in_both_shapes():
    choices = [Choice("a\ufffd", "length", TOKENS)]
    chat = shape(Chat, wants_logprobs=True).body(choices, BILL)["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in chat] == [-0.5, -1.0]
    assert [one["bytes"] for one in chat] == [[97], None]  # of a part of a character nothing is known
    assert chat[1]["top_logprobs"] == [{"token": "c", "logprob": -1.5, "bytes": [99]}]
    plain = shape(Plain, wants_logprobs=True).body(choices, BILL)["choices"][0]["logprobs"]
    assert plain["text_offset"] == [0, 1]
    assert plain["top_logprobs"] == [{}, {"c": -1.5}]
    assert shape(Chat).body(choices, BILL)["choices"][0]["logprobs"] is None


def test_the_bill_of_several_prompts_weighs_each_by_its_size():
    small = replace(BILL, compute=1.0, flops=10, dense_flops=10, tokens_by_width={"1": 4}, first_token_seconds=0.1)
    large = replace(
        BILL, is_held=False, compute=0.6, flops=18, dense_flops=30, tokens_by_width={"1": 1, "0.5": 2}, is_lowered=True
    )
    found = total([small, large])
    assert found.compute == pytest.approx(0.7)
    assert found.target == pytest.approx(0.75)
    assert found.is_held
    assert (found.flops, found.dense_flops, found.compute_with_context) == (28, 40, 0.7)
    assert found.tokens_by_width == {"1": 5, "0.5": 2}
    assert (found.num_new_tokens, found.is_lowered, found.first_token_seconds) == (4, True, 0.1)
    assert total([small]) is small
