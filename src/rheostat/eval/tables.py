"""The figures of `rheostat eval` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

TEXT_HEADINGS = ("asked", "spent", "FFN", "perplexity", "ratio to dense", "accuracy", "agreement", "tokens/s")
TASK_HEADINGS = ("asked", "spent", "FFN", "metric", "score", "less dense", "rows/s")


def text_table(text: Mapping[str, Any]) -> Table:
    """The runs on one text."""
    tokens = text["runs"][0]["num_tokens"]
    size = f"{text['windows']} windows of {text['length']}, {tokens:,} predicted tokens"
    table = _table(f"{text['name']}: {size}", TEXT_HEADINGS)
    for row in text["runs"]:
        table.add_row(*_text_cells(row))
    return table


def task_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one task, as a report holds them: a line for each setting and metric."""
    table = _table(f"{rows[0]['task']}: {rows[0]['rows']:,} rows, {rows[0]['mode']}", TASK_HEADINGS)
    for row in rows:
        table.add_row(*_task_cells(row))
    return table


def task_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of that table has to know about it."""
    notes = []
    if cut := rows[0]["num_truncated"]:
        notes.append(f"{cut:,} of {rows[0]['num_requests']:,} contexts cut on the left to what the model reads")
    unended = {row["compute"]: row["num_unended"] for row in rows if row["num_unended"]}
    return notes + [f"at {asked:g}, the limit of tokens ended {count:,} answers" for asked, count in unended.items()]


def _table(title: str, headings: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("run")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _text_cells(row: Mapping[str, Any]) -> list[str]:
    is_rival = row["kind"] not in ("dense", "dial")
    ratio = "1" if row["kind"] == "dense" else f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}"
    return [
        ("  " if is_rival else "") + row["kind"],
        f"{row['asked']:g}",
        f"{row['compute']:.3f}",
        f"{row['ffn_fraction']:.0%}",
        f"{row['perplexity']:.2f}",
        ratio,
        f"{row['accuracy']:.1%}",
        f"{row['agreement']:.1%}",
        f"{row['tokens_per_second']:,.0f}",
    ]


def _task_cells(row: Mapping[str, Any]) -> list[str]:
    is_dense = row["kind"] == "dense"
    return [
        row["kind"],
        f"{row['compute']:g}",
        f"{row['spent']:.3f}",
        f"{row['ffn_fraction']:.0%}",
        row["metric"],
        _with_error(row["score"], row["stderr"]),
        "0" if is_dense else _with_error(row["paired_difference"], row["paired_stderr"], "+"),
        f"{row['rows'] / row['seconds']:,.1f}",
    ]


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if error is None else f"{value:{sign}.4g} ± {error:.2g}"
