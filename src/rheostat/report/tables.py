"""The tables of a report as plain text cells; how they look is up to the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rheostat.report.curves import CLOCKS, spread
from rheostat.report.schema import Drafts, Report, Run, Text, kind_of
from rheostat.terminal import short

NONE = "n/a"
"""In a cell whose figure could not be had."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headings and rows. The first `num_words` columns are words, the others numbers."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_words: int = 0
    strong: int | None = None
    """The column that matters most."""


def quality(text: Text, method: str) -> Table:
    """Perplexity, accuracy and agreement at each setting of the dial, each baseline in a column of its own."""
    dense, dials = text["runs"][0], [run for run in text["runs"] if run["kind"] == "dial"]
    rivals = list(dict.fromkeys(run["kind"] for run in text["runs"] if run["kind"] not in ("dense", "dial")))
    found = {(run["kind"], run["asked"]): run for run in text["runs"]}
    rows = []
    for run in (dense, *dials):
        beside = [found.get((kind, run["asked"])) for kind in rivals]
        rows.append(
            (
                f"{run['asked']:g}",
                f"{run['compute']:.3f}",
                f"{run['ffn_fraction']:.0%}",
                number(run["perplexity"], ".2f"),
                "1" if run is dense else ratio(run),
                *("" if one is None else ratio(one) for one in beside),
                with_error(run["accuracy"], run.get("accuracy_error"), is_share=True),
                with_error(run["agreement"], run.get("agreement_error"), is_share=True),
            )
        )
    first = ("asked", "spent", "FFN width", "perplexity", f"{method}, ratio to dense")
    last = (*(f"{kind} baseline" for kind in rivals), "accuracy", "same top token as dense")
    return Table(headings=(*first, *last), rows=tuple(rows), strong=4)


def cost(text: Text) -> Table | None:
    """FLOPs and bytes at each setting of the dial; None for a report without them."""
    runs = [run for run in text["runs"] if run["kind"] in ("dense", "dial") and "flops_per_token" in run]
    if not runs:
        return None
    rows = tuple(
        (
            f"{run['asked']:g}",
            short(run["flops_per_token"]),
            f"{run['compute']:.3f}",
            f"{run['compute_with_context']:.3f}",
            *_bytes(run, runs[0]),
        )
        for run in runs
    )
    headings = (
        "asked",
        "FLOPs a token",
        "of dense, without context",
        "of dense, with context",
        "bytes to decode a token",
        "of dense",
    )
    return Table(headings=headings, rows=rows)


def _bytes(run: Run, dense: Run) -> tuple[str, str]:
    mine, full = run.get("bytes_per_token"), dense.get("bytes_per_token")
    if not mine or not full:
        return (NONE, NONE)
    return (f"{short(mine)}B", f"{mine / full:.3f}")


def bench(report: Report) -> Table | None:
    """Measured times."""
    keys = [*CLOCKS, "tokens_per_s"]
    found = report.get("bench", [])
    has_drafts = any("drafts" in one for one in found)
    rows = tuple(
        (
            one["side"],
            NONE if one["compute"] is None else f"{one['compute']:g}",
            *(_spread_cell(one.get(key)) for key in keys),
            *(_drafts_cells(one.get("drafts")) if has_drafts else ()),
        )
        for one in found
    )
    headings = ("side", "compute", "each decoded token, ms", "first token, ms", "tokens/s")
    more = ("accepted drafts", "by place", "tokens a round", "bytes a token") if has_drafts else ()
    return Table(headings=(*headings, *more), rows=rows, num_words=1) if rows else None


def _drafts_cells(drafts: Drafts | None) -> tuple[str, ...]:
    if drafts is None:
        return (NONE,) * 4
    places = " ".join(f"{share:.2f}" for share in drafts["acceptance_by_place"])
    rate = f"{drafts['tokens_per_round']:.2f}"
    return (f"{drafts['acceptance']:.2f}", places, rate, f"{short(drafts['bytes_per_token'])}B")


def _spread_cell(value: Any) -> str:
    found = spread(value)
    if found is None:
        return NONE
    low, median, high = found
    return f"{median:.4g}" if low == high else f"{median:.4g} [{low:.4g}, {high:.4g}]"


def tasks(report: Report) -> Table | None:
    """Scores on questions."""
    rows = tuple(
        (
            one["task"],
            one["metric"],
            one.get("mode", ""),
            kind_of(one),
            f"{one['compute']:g}",
            with_error(one["score"], one.get("stderr")),
            signed(one.get("paired_difference"), one.get("paired_stderr")),
            f"{one['rows']:,}" if "rows" in one else "",
        )
        for one in report.get("tasks", [])
    )
    headings = ("task", "metric", "mode", "run", "compute", "score", "less dense", "questions")
    return Table(headings=headings, rows=rows, num_words=4) if rows else None


def dial(table: Mapping[str, Any]) -> Table | None:
    """The dial's calibration: `compute`, and the native setting of each method that gives it."""
    if len(table["compute"]) < 2:
        return None
    columns = table["settings"]
    rows = tuple(
        (f"{compute:.3f}", *(f"{values[i]:.4g}" for values in columns.values()))
        for i, compute in enumerate(table["compute"])
    )
    return Table(headings=("compute", *(f"{name} setting" for name in columns)), rows=rows)


ORIGIN = ("command", "rheostat", "commit", "seed", "python", "torch", "transformers", "time")


def provenance(origin: Mapping[str, Any]) -> Table:
    """Where figures come from, a fact a row."""
    facts = [(key, origin[key]) for key in ORIGIN if origin.get(key) is not None]
    hardware = origin.get("hardware") or {}
    if isinstance(hardware, Mapping):
        facts += [("hardware", ", ".join(f"{key} {value}" for key, value in hardware.items()))] if hardware else []
    facts += [(key, value) for key, value in origin.items() if key.endswith("digest") and value]
    facts += [(key, origin[key]) for key in ("model",) if origin.get(key)]
    return Table(
        headings=("", "value"), rows=tuple((key.replace("_", " "), str(value)) for key, value in facts), num_words=2
    )


# -- cells


def number(value: float | None, style: str) -> str:
    """A figure that may be missing."""
    return NONE if value is None else format(value, style)


def ratio(run: Run) -> str:
    """Perplexity ratio with its standard error."""
    return with_error(run["ratio"], run["ratio_error"])


def with_error(value: float | None, error: float | None, *, is_share: bool = False) -> str:
    """A figure, and its standard error where there is one and it is not 0."""
    if value is None:
        return NONE
    if is_share:
        return f"{value:.1%}" + (f" ± {100 * error:.1f}" if error else "")
    return f"{value:.3f}" + (f" ± {error:.3f}" if error else "")


def signed(value: float | None, error: float | None) -> str:
    """A difference with its standard error; empty where there is none."""
    if value is None:
        return ""
    return f"{round(value, 3) + 0.0:+.3f}" + (f" ± {error:.3f}" if error else "")
