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


def task_table(task: Mapping[str, Any]) -> Table:
    """The runs of one task; a line for each metric."""
    table = _table(f"{task['name']}: {task['rows']:,} rows, {task['runs'][0]['mode']}", TASK_HEADINGS)
    for row in task["runs"]:
        for name, metric in row["metrics"].items():
            table.add_row(*_task_cells(row, name, metric))
    return table


def task_notes(task: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know about its rows."""
    first, notes = task["runs"][0], []
    if cut := first["num_truncated"]:
        notes.append(f"{cut:,} of {first['num_requests']:,} contexts cut on the left to what the model reads")
    unended = [(row["asked"], row["num_unended"]) for row in task["runs"] if row["num_unended"]]
    return notes + [f"at {asked:g}, the limit of tokens ended {count:,} answers" for asked, count in unended]


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


def _task_cells(row: Mapping[str, Any], name: str, metric: Mapping[str, Any]) -> list[str]:
    difference = "0" if row["kind"] == "dense" else _with_error(metric["difference"], metric["difference_error"], "+")
    return [
        row["kind"],
        f"{row['asked']:g}",
        f"{row['compute']:.3f}",
        f"{row['ffn_fraction']:.0%}",
        name,
        _with_error(metric["score"], metric["score_error"]),
        difference,
        f"{row['num_rows'] / row['seconds']:,.1f}",
    ]


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if error is None else f"{value:{sign}.4g} ± {error:.2g}"
