"""Text as it comes: nothing is lost, and no character comes in pieces."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from rheostat import terminal
from rheostat.commands.writer import Writer, num_unsettled
from tests.conftest import SPECIAL, byte_tokenizer

TOKENIZER = byte_tokenizer()


def written(token_ids: list[int]) -> tuple[str, list[str]]:
    """All that a writer wrote, and the pieces."""
    stream, pieces = io.StringIO(), []
    writer = Writer(stream, TOKENIZER.decode, None)
    for token in token_ids:
        before = len(stream.getvalue())
        writer.push(token, 1.0)
        pieces.append(stream.getvalue()[before:])
    writer.finish()
    return writer.text, pieces


def test_a_character_comes_whole():
    token_ids = TOKENIZER("né€𝄞!")["input_ids"]
    text, pieces = written(token_ids)
    assert text == "né€𝄞!"
    assert pieces == ["n", "", "é", "", "", "€", "", "", "", "𝄞", "!"]


@given(st.text())
def test_writing_loses_nothing(text: str):
    assert written(TOKENIZER(text)["input_ids"])[0] == text


@given(st.lists(st.integers(len(SPECIAL), len(TOKENIZER) - 1), max_size=30))
def test_bytes_that_are_no_text_come_as_the_tokenizer_decodes_them(token_ids: list[int]):
    assert written(token_ids)[0] == TOKENIZER.decode(token_ids, clean_up_tokenization_spaces=False)


def test_only_what_later_bytes_can_change_is_held_back():
    assert [num_unsettled(text) for text in ("", "a", "a\ufffd", "\ufffda", "a" + 9 * "\ufffd")] == [0, 0, 1, 0, 3]


def test_a_token_has_the_colour_of_what_it_cost():
    stream = io.StringIO()
    writer = Writer(stream, TOKENIZER.decode, 0.5)
    for token, fraction in zip(TOKENIZER("ab")["input_ids"], (0.5, 1.0), strict=True):
        writer.push(token, fraction)
    writer.finish()
    cheap, dear = (terminal.ramp_colour(fraction, 0.5) for fraction in (0.5, 1.0))
    assert stream.getvalue() == terminal.paint("a", cheap) + terminal.paint("b", dear)
    assert cheap != dear


def test_control_characters_do_not_reach_the_terminal():
    stream = io.StringIO()
    writer = Writer(stream, TOKENIZER.decode, None)
    for token in TOKENIZER("a\x1b[2Jb")["input_ids"]:
        writer.push(token, 1.0)
    writer.finish()
    assert "\x1b" not in stream.getvalue()
    assert writer.text == "a\x1b[2Jb", "what the figures hold is as it was written"
