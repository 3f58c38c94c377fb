"""The table a user decides with: one row a setting, from all that a report holds of it: texts, tasks, times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rheostat.report.curves import spread
from rheostat.report.schema import Bench, Report, Task, kind_of
from rheostat.report.tables import NONE, Table, number, with_error
from rheostat.terminal import short

Key = tuple[str, float]
"""(kind, compute as asked)."""

LOW_BIT = ("int8", "int4")
"""How the names of sides end whose weights are of another precision than those that quality was measured with."""

TIMES = (
    ("first token, ms", "ttft_ms", False),
    ("tokens/s", "tokens_per_s", False),
    ("tokens/s, low-bit weights", "tokens_per_s", True),
)
"""Heading, measure, and whether of sides with low-bit weights."""


def summary(report: Report) -> Table | None:
    """Every setting with its quality and its price; None for a report of texts alone, whose tables say it all."""
    if not report.get("tasks") and not report.get("bench"):
        return None
    averages = average_choice(report.get("tasks", []))
    keys = _keys(report)
    columns = [_runs_column(text["name"], text["runs"]) for text in report["texts"]]
    if averages:
        count, rows = next(iter(averages.values()))[2:]
        cells = {key: with_error(mean, error, is_share=True) for key, (mean, error, _, _) in averages.items()}
        columns.append((f"{count} choice tasks, mean accuracy ({rows:,} questions)", cells))
    if report["texts"]:
        runs = {(run["kind"], run["asked"]): run for run in report["texts"][0]["runs"]}
        columns.insert(0, ("spent", {key: f"{run['compute']:.3f}" for key, run in runs.items()}))
        flops = {key: short(run["flops_per_token"]) for key, run in runs.items() if "flops_per_token" in run}
        moved = {key: f"{short(size)}B" for key, run in runs.items() if (size := run.get("bytes_per_token"))}
        columns += [("FLOPs a token", flops), ("bytes to decode a token", moved)]
    for heading, field, is_low_bit in TIMES:
        columns.append((heading, _times(report.get("bench", []), field, is_low_bit=is_low_bit)))
    columns = [(heading, cells) for heading, cells in columns if cells]
    return Table(
        headings=("", "asked", *(heading for heading, _ in columns)),
        rows=tuple(
            (kind, f"{asked:g}", *(cells.get((kind, asked), NONE) for _, cells in columns)) for kind, asked in keys
        ),
        num_words=1,
    )


def _keys(report: Report) -> list[Key]:
    """Dense first, then the settings from high to low, each before its baselines."""
    found: dict[Key, None] = {}
    for text in report["texts"]:
        found |= dict.fromkeys((run["kind"], run["asked"]) for run in text["runs"])
    found |= dict.fromkeys((kind_of(one), one["compute"]) for one in report.get("tasks", []))
    found |= dict.fromkeys(("dial", one["compute"] or 1.0) for one in report.get("bench", []) if _is_ours(one))
    order = list(dict.fromkeys(kind for kind, _ in found))
    order.sort(key=lambda kind: {"dense": 0, "dial": 1}.get(kind, 2))
    return sorted(found, key=lambda key: (key[0] != "dense", -key[1], order.index(key[0])))


def _runs_column(name: str, runs: Sequence[Any]) -> tuple[str, dict[Key, str]]:
    cells = {}
    for run in runs:
        ratio = "" if run["kind"] == "dense" or run["ratio"] is None else f" ({run['ratio']:.3f}x)"
        cells[run["kind"], run["asked"]] = number(run["perplexity"], ".2f") + ratio
    return f"perplexity, {name}", cells


def average_choice(tasks: Sequence[Task]) -> dict[Key, tuple[float, float, int, int]]:
    """(kind, compute) -> mean accuracy over the multiple-choice tasks, its standard error, tasks, questions.

    Each task counts once, however many questions it has, by `acc_norm` where it has that and by `acc` otherwise. Only
    settings that answered every task are there.
    """
    best: dict[tuple[Key, str], Task] = {}
    for one in tasks:
        if one.get("is_choice") and one["metric"] in ("acc", "acc_norm"):
            key = ((kind_of(one), one["compute"]), one["task"])
            if key not in best or one["metric"] == "acc_norm":
                best[key] = one
    names = {name for _, name in best}
    found: dict[Key, tuple[float, float, int, int]] = {}
    for setting in dict.fromkeys(key for key, _ in best):
        mine = [best[setting, name] for name in names if (setting, name) in best]
        scores = [one["score"] for one in mine]
        if len(mine) < len(names) or any(score is None for score in scores):
            continue
        error = math.sqrt(math.fsum((one.get("stderr") or 0.0) ** 2 for one in mine)) / len(mine)
        mean = math.fsum(score for score in scores if score is not None) / len(mine)
        found[setting] = (mean, error, len(mine), sum(one.get("rows", 0) for one in mine))
    return found


def _times(bench: Sequence[Bench], field: str, *, is_low_bit: bool) -> dict[Key, str]:
    """Setting -> median of the side that was quickest at this very measure: of stock's for the dense model, of ours for
    the dial's settings; sides with low-bit weights, whose answers differ, apart from the others."""
    best: dict[Key, float] = {}
    for one in bench:
        found = spread(one.get(field))
        key = ("dial", one["compute"] or 1.0) if _is_ours(one) else ("dense", 1.0)
        is_rival = not _is_ours(one) and not one["side"].startswith("stock")
        if found is None or is_rival or one["side"].endswith(LOW_BIT) is not is_low_bit:
            continue
        choose = min if field == "ttft_ms" else max
        best[key] = choose(best.get(key, found[1]), found[1])
    return {key: f"{value:.4g}" for key, value in best.items()}


def _is_ours(one: Bench) -> bool:
    return one["side"].startswith(("dial", "native")) and one["compute"] is not None
