"""From sides and settings to rows of figures: which cells are timed, who is compared with whom, how near the roof.

A cell is a prompt length and a batch. A row is one side in one cell.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rheostat.bench.roof import Roof
from rheostat.bench.sides import Side, Spent, once
from rheostat.bench.timing import Clock, ratios, summarise, take_turns
from rheostat.cost import Cost
from rheostat.methods.base import Progress, no_progress

PHASES = ("first_token", "token")
"""What is timed: the prompt's pass, and each further token of a row."""


@dataclass(frozen=True, order=True)
class Cell:
    """What is run."""

    prompt: int
    """Tokens of each prompt."""
    batch: int
    """Rows."""


def plan(prompts: Sequence[int], batches: Sequence[int]) -> list[Cell]:
    """Every prompt length at the first batch size, then every further batch size at the first prompt length."""
    cells = [Cell(prompt, batches[0]) for prompt in prompts] + [Cell(prompts[0], batch) for batch in batches]
    return list(dict.fromkeys(cells))


def time_cell(
    sides: Sequence[Side],
    windows: torch.Tensor,
    cell: Cell,
    *,
    new: int,
    rounds: int,
    roof: Roof,
    clock: Clock = time.perf_counter,
    progress: Progress = no_progress,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time all sides that take this cell, in turn.

    Args:
        windows: [N, T], from which the prompts are cut; N and T at least the cell's.
        new: tokens written after each prompt, at least 2.

    Returns:
        A row for each side, stock first, the quickest stock at the top; and notes on sides that were left out.
    """
    ids = windows[: cell.batch, : cell.prompt]
    what = f"prompt {cell.prompt}, batch {cell.batch}"
    spent: dict[str, Spent] = {}
    notes, ready = [], []
    for side in sides:
        label = side.spec.label
        if side.max_rows is not None and cell.batch > side.max_rows:
            notes.append(f"{label}: not at batch {cell.batch}, it takes {side.max_rows} at a time")
            continue
        if (trouble := _trouble(side, ids, clock)) is not None:
            notes.append(f"{label}: cannot run prompt {cell.prompt}, batch {cell.batch} here ({trouble})")
            continue
        spent[label] = side.spent(ids, new - 1)
        ready.append(side)
    trials = {side.spec.label: partial(once, side, ids, new, clock) for side in ready}
    times = take_turns(trials, rounds=rounds, progress=progress, what=what)
    return rows(ready, cell, new, times, spent, roof), notes


def _trouble(side: Side, ids: torch.Tensor, clock: Clock) -> str | None:
    """Why a side cannot run this machine's way: a dtype without kernels, too little memory. None where it can."""
    try:
        once(side, ids, 2, clock)
    except torch.OutOfMemoryError:
        return "out of memory"
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return " ".join(str(error).split())
    return None


def rows(
    sides: Iterable[Side],
    cell: Cell,
    new: int,
    times: dict[str, dict[str, list[float]]],
    spent: dict[str, Spent],
    roof: Roof,
) -> list[dict[str, Any]]:
    """One row a side, as plain types."""
    best = {phase: _best_stock(sides, times, phase) for phase in PHASES}
    out = []
    for side in sides:
        label, seconds, bill = side.spec.label, times[side.spec.label], spent[side.spec.label]
        row: dict[str, Any] = {
            "side": label,
            "kind": side.spec.kind,
            "dtype": side.spec.dtype,
            "prompt": cell.prompt,
            "batch": cell.batch,
            "new": new,
            "asked": side.spec.compute,
            "compute": bill.compute,
            "drafts": bill.drafts,
        }
        costs = {"first_token": (bill.prefill, 1), "token": (bill.decode, bill.num_steps)}
        for phase in PHASES:
            cost, passes = costs[phase]
            row[phase] = _phase(seconds[phase], cost, passes, roof, side.spec.dtype)
            base = best[phase]
            row[phase]["speedup"] = ratios(times[base][phase], seconds[phase]).to_dict() if base else None
            row[phase]["against"] = base
        row["prompt_tokens_per_second"] = cell.prompt * cell.batch / row["first_token"]["seconds"]["median"]
        row["tokens_per_second"] = cell.batch / row["token"]["seconds"]["median"]
        out.append(row)
    return sorted(out, key=lambda row: _place(row, "token"))


def _place(row: dict[str, Any], phase: str) -> tuple[int, float]:
    """Stock before the others, the quickest first; the others in the order they were given."""
    return (0, row[phase]["seconds"]["median"]) if row["kind"] == "stock" else (1, 0.0)


def by_phase(found: Iterable[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    """Rows of one cell in the order in which a table of `phase` shows them."""
    return sorted(found, key=lambda row: _place(row, phase))


def _best_stock(sides: Iterable[Side], times: dict[str, dict[str, list[float]]], phase: str) -> str | None:
    medians = {
        side.spec.label: summarise(times[side.spec.label][phase]).median for side in sides if side.spec.kind == "stock"
    }
    return min(medians, key=medians.__getitem__) if medians else None


def _phase(seconds: Sequence[float], cost: Cost, passes: int, roof: Roof, dtype: str) -> dict[str, Any]:
    """Times of one phase, and the rates of a pass of median length beside the roof."""
    summary = summarise(seconds)
    num_bytes, flops = cost.bytes.total / passes, cost.flops.total / passes
    rates = {"bytes_per_second": num_bytes / summary.median, "flops_per_second": flops / summary.median}
    return {
        "seconds": summary.to_dict(),
        "rounds": list(seconds),
        "bytes": num_bytes,
        "flops": flops,
        "of_bandwidth": rates["bytes_per_second"] / roof.bandwidth,
        "of_flops": rates["flops_per_second"] / roof.flops(dtype),
    } | rates
