"""Whatever the width, each number can be read."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from rheostat.terminal import console

HEADINGS = ("spent", "ms", "quartiles", "prompt tokens/s", "against best stock", "of roof")
NUMBERS = ("0.71", "25.13", "24.87–25.94", "12,345", "1.42x (1.31–1.50)", "87%")


def sample() -> Table:
    table = Table(title="time per output token", title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("prompt")
    table.add_column("side", justify="left", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for side in ("native bf16 0.71", "stock float32"):
        table.add_row("4096", side, *NUMBERS)
    return table


def shown(table: Table, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO()
    console(stream).print(table)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [48, 60, 80, 100, 120, 200])
def test_numbers_are_whole_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch):
    lines = shown(sample(), width, monkeypatch)
    text = "\n".join(lines)
    assert "…" not in text
    for number in NUMBERS:
        assert text.count(number) >= 2, number
    assert max(map(len, lines)) <= width
    assert text.count("time per output token") == 1
    for line in lines:  # what a row is stands beside each part of it
        assert ("25.13" not in line and "1.42x" not in line) or "native" in line or "stock" in line


def test_nothing_is_left_out_where_not_even_one_column_fits(monkeypatch: pytest.MonkeyPatch):
    text = "\n".join(shown(sample(), 24, monkeypatch))
    assert "…" not in text
    assert sorted(set("".join(NUMBERS))) == sorted(set(text) & set("".join(NUMBERS)))


def test_a_table_with_room_is_as_it_was(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    Console(file=stream, width=120).print(sample())
    assert shown(sample(), 120, monkeypatch) == stream.getvalue().splitlines()


def test_words_wrap_before_numbers_move(monkeypatch: pytest.MonkeyPatch):
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_row("a rather long description of it", "1,234,567")
    lines = shown(table, 30, monkeypatch)
    assert len(lines) == 3
    assert lines[1].endswith("1,234,567")
