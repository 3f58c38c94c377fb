"""The page is whole, needs nothing else, and lets no text through as HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from rheostat.report.page import page
from rheostat.report.schema import check
from tests.report.sample import NASTY, old_sample, sample


class Reader(HTMLParser):
    """Checks that elements are closed in order; keeps ids, words, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(value or "")
            assert not key.startswith("on")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "meta":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def text(written: list[Path]) -> str:
    """The page of the sample."""
    return next(path for path in written if path.suffix == ".html").read_text()


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_it_is_whole_and_alone(text: str, is_old: bool):
    text = page(check(old_sample())) if is_old else text
    reader = read(text)
    assert reader.fetched == []
    assert not reader.seen & {"script", "link", "iframe", "object"}
    assert "@import" not in text
    assert "url(http" not in text
    assert len(reader.ids) == len(set(reader.ids))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert text.startswith("<!DOCTYPE html>")
    assert "1.050 ± 0.010" in "".join(reader.words)


def test_text_is_escaped():
    report = sample(NASTY, model=NASTY)
    report["method"]["name"] = NASTY
    report["base"]["hub_id"] = NASTY
    report["provenance"]["command"] = NASTY
    report["tasks"][0]["task"] = report["bench"][0]["side"] = NASTY
    report["texts"][0]["passage"]["tokens"][0] = NASTY
    text = page(report)
    reader = read(text)
    assert "script" not in reader.seen
    assert "<script" not in text
    assert NASTY in "".join(reader.words)


def test_tokens_carry_their_price(text: str):
    assert '" title="90%"> river</span>' in text
    assert "é&lt;b&gt;" in text
    assert "↵\n</span>" in text
    assert text.count("<details") == 4
    assert text.count("<details open>") == 1
