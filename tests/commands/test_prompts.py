"""Prompts from an argument, standard input and a file."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from rheostat.commands.prompts import read_prompt
from rheostat.errors import SettingError


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_an_argument_is_taken_as_it_is():
    assert read_prompt("Rivers\n", None) == "Rivers\n"


@pytest.mark.parametrize(
    ("content", "text"), [(b"Z\xc3\xbcrich\n", "Zürich"), (b"a\n\n", "a\n"), (b"a\r\n", "a"), (b"a", "a")]
)
def test_a_file_and_standard_input_lose_one_line_end(tmp_path: Path, monkeypatch, content: bytes, text: str):
    (tmp_path / "prompt.txt").write_bytes(content)
    assert read_prompt(None, str(tmp_path / "prompt.txt")) == text
    pipe(monkeypatch, content)
    assert read_prompt("-", None) == text


def test_what_is_no_prompt(tmp_path: Path, monkeypatch):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match=r"prompt_file='.*bytes': must be text in UTF-8"):
        read_prompt(None, str(tmp_path / "bytes"))
    with pytest.raises(SettingError, match=r"prompt_file='.*none': must be a file that can be read \(No such file"):
        read_prompt(None, str(tmp_path / "none"))
    with pytest.raises(SettingError, match="prompt_file='f': must be left out where a prompt is given"):
        read_prompt("Hi", "f")
    with pytest.raises(SettingError, match="prompt: must be given"):
        read_prompt(None, None)
    pipe(monkeypatch, b"\xff")
    with pytest.raises(SettingError, match="prompt='-': must be text in UTF-8"):
        read_prompt("-", None)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SettingError, match="standard input is closed"):
        read_prompt("-", None)
