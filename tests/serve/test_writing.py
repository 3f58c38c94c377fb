"""Tokens to text, piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.serve.writing import Writer


@pytest.fixture(scope="module")
def decode(tiny_tokenizer: Any):
    return lambda ids: tiny_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def written(writer: Writer, ids: list[int]) -> list[str]:
    return [writer.push(id) for id in ids] + [writer.finish()]


def test_half_a_character_waits(decode, tiny_tokenizer: Any):
    ids = tiny_tokenizer("a€😀b")["input_ids"]
    assert written(Writer(decode), ids) == ["a", "", "", "€", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_shows_in_the_end(decode, tiny_tokenizer: Any):
    ids = tiny_tokenizer("a€")["input_ids"][:-1]
    pieces = written(Writer(decode), ids)
    assert pieces[:3] == ["a", "", ""]
    assert "".join(pieces) == decode(ids)


def test_bytes_that_never_settle_do_not_wait_for_ever(decode, tiny_tokenizer: Any):
    ids = tiny_tokenizer("€")["input_ids"][:1] * 9
    writer = Writer(decode)
    assert "".join(writer.push(id) for id in ids)


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=20))
def test_the_pieces_are_the_text(tiny_tokenizer: Any, decode, text: str):
    ids = tiny_tokenizer(text)["input_ids"]
    assert "".join(written(Writer(decode), ids)) == decode(ids)


@settings(max_examples=50, deadline=None)
@given(text=st.text("abc", max_size=20), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_and_never_shows(tiny_tokenizer: Any, decode, text: str, stops: list[str]):
    writer = Writer(decode, stops)
    shown = ""
    for id in tiny_tokenizer(text)["input_ids"]:
        shown += writer.push(id)
        if writer.is_stopped:
            break
    shown += writer.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
        assert not writer.is_stopped
        return
    assert writer.is_stopped
    first = text[: min(ends)]  # the stop string that is complete first
    assert shown == first[: min(first.find(stop) for stop in stops if stop in first)]
    assert writer.text == shown
