"""The figures of a bench as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rheostat.bench.measuring import by_phase
from rheostat.terminal import short

if TYPE_CHECKING:
    from rich.table import Table

BUSY = 0.5
"""Waiting processes a core above which figures are called those of a busy machine."""

RATE_HEADINGS = ("GB/s", "of roof", "GFLOP/s", "of roof")


def roof_table(roof: dict[str, Any]) -> Table:
    """Rates of the machine."""
    place = roof["machine"]
    details = [
        f"{place['threads']} threads" if "threads" in place else "",
        place.get("simd", ""),
        f"torch {place['torch']}",
    ]
    title = ", ".join(filter(None, [place["device"], *details]))
    table = _table(f"roof of {title}", "dtype", "one-row products GB/s", "matrix products GFLOP/s")
    for dtype in dict.fromkeys([*roof["rows"], *roof["products"]]):
        rates = (roof["rows"].get(dtype), roof["products"].get(dtype))
        table.add_row(dtype, *(_giga(rate) for rate in rates))
    table.add_row("plain reading", _giga(roof["read"]), "")
    return table


def is_busy(load: float, cores: int | None) -> bool:
    """Whether so much else ran that figures cannot be trusted."""
    return load > BUSY * (cores or 1)


def phase_table(found: Sequence[dict[str, Any]], phase: str, title: str, column: str) -> Table:
    """Times of one phase, grouped by `column` (`prompt` or `batch`)."""
    throughput = "tokens/s" if phase == "token" else "prompt tokens/s"
    table = _table(title, column, "side", "spent", "ms", "quartiles", throughput, "against best stock", *RATE_HEADINGS)
    for value, group in groupby(found, key=lambda row: row[column]):
        for place, row in enumerate(by_phase(group, phase)):
            table.add_row(f"{value}" if not place else "", *_cells(row, phase), end_section=False)
    return table


def drafts_table(found: Sequence[dict[str, Any]]) -> Table:
    """What drafting came to, of the rows in which somebody drafted."""
    table = _table("drafts", "prompt", "batch", "side", "accepted", "by place", "tokens a round", "bytes a token")
    for row in found:
        if (drafts := row["drafts"]) is None:
            continue
        places = " ".join(f"{share:.2f}" for share in drafts["acceptance_by_place"])
        cells = (f"{drafts['acceptance']:.2f}", places, f"{drafts['tokens_per_round']:.2f}")
        held = f"{short(row['token']['bytes'] / row['batch'])}B"
        table.add_row(str(row["prompt"]), str(row["batch"]), row["side"], *cells, held)
    return table


def memory_table(found: Iterable[dict[str, Any]]) -> Table:
    """What each side holds."""
    found = list(found)
    prompt, batch = (found[0][key] for key in ("prompt", "batch")) if found else (0, 0)
    table = _table(f"memory, prompt {prompt}, batch {batch}", "side", "loaded", "peak while it runs")
    for row in found:
        if "error" in row:
            table.add_row(row["side"], "failed", "")
            continue
        note = " (loading included)" if row["is_whole"] else ""
        table.add_row(row["side"], f"{short(row['loaded_bytes'])}B", f"{short(row['peak_bytes'])}B{note}")
    return table


def _cells(row: dict[str, Any], phase: str) -> list[str]:
    one = row[phase]
    seconds, speedup = one["seconds"], one["speedup"]
    rate = row["tokens_per_second" if phase == "token" else "prompt_tokens_per_second"]
    spread = f"{1e3 * seconds['low']:.4g}–{1e3 * seconds['high']:.4g}"
    against = "" if speedup is None else f"{speedup['median']:.2f}x ({speedup['low']:.2f}–{speedup['high']:.2f})"
    if row["side"] == one["against"]:
        against = "1"
    return [
        row["side"],
        f"{row['compute']:.2f}",
        f"{1e3 * seconds['median']:.4g}",
        spread,
        f"{rate:,.0f}",
        against,
        _giga(one["bytes_per_second"]),
        f"{one['of_bandwidth']:.0%}",
        _giga(one["flops_per_second"]),
        f"{one['of_flops']:.0%}",
    ]


def _giga(rate: float | None) -> str:
    return "–" if rate is None else f"{rate / 1e9:.3g}"


def _table(title: str, first: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "side" else "right", no_wrap=heading == "side")
    return table
