"""What `rheostat bench` measured, as the rows of times that a report holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rheostat.report.schema import Bench, Spread


def times(figures: Mapping[str, Any]) -> list[Bench]:
    """One row for each side and setting: at the longest prompt that was timed, and the first batch size.

    Args:
        figures: what `bench.json` holds.
    """
    settings = figures["settings"]
    prompt, batch = max(settings["prompts"]), settings["batch"][0]
    rows = [row for row in figures["rows"] if (row["prompt"], row["batch"]) == (prompt, batch)]
    return [_row(row) for row in rows]


def _row(row: Mapping[str, Any]) -> Bench:
    is_dial = row["kind"] in ("dial", "native")
    seconds, drafts = row["token"]["seconds"], row.get("drafts")
    one: Bench = {
        "side": row["side"].removesuffix(f" {row['asked']:g}") if is_dial else row["side"],
        "compute": row["asked"] if is_dial else None,
        "ttft_ms": _milliseconds(row["first_token"]["seconds"]),
        "tpot_ms": _milliseconds(seconds),
        "tokens_per_s": {
            "median": row["batch"] / seconds["median"],
            "low": row["batch"] / seconds["high"],
            "high": row["batch"] / seconds["low"],
        },
        "prompt": row["prompt"],
        "batch": row["batch"],
    }
    if drafts is not None:
        one["drafts"] = {
            "acceptance": drafts["acceptance"],
            "acceptance_by_place": drafts["acceptance_by_place"],
            "tokens_per_round": drafts["tokens_per_round"],
            "bytes_per_token": row["token"]["bytes"] / row["batch"],
        }
    return one


def _milliseconds(seconds: Mapping[str, float]) -> Spread:
    return {"median": 1000 * seconds["median"], "low": 1000 * seconds["low"], "high": 1000 * seconds["high"]}
