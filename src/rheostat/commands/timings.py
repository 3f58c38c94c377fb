"""What `rheostat bench` shows and writes: tables, `bench.json`, and times for a report of the same model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rheostat.report import to_json, write_whole
from rheostat.terminal import console


def show(figures: dict[str, Any]) -> None:
    """Tables of time, drafts, memory and the machine's roof, and what to bear in mind."""
    from rheostat.bench import tables

    out = console()
    if rows := figures.get("rows"):
        first_batch, first_prompt = figures["settings"]["batch"][0], figures["settings"]["prompts"][0]
        by_prompt = [row for row in rows if row["batch"] == first_batch]
        by_batch = [row for row in rows if row["prompt"] == first_prompt]
        out.print(tables.phase_table(by_prompt, "first_token", f"time to first token, batch {first_batch}", "prompt"))
        out.print()
        out.print(tables.phase_table(by_prompt, "token", f"time per output token, batch {first_batch}", "prompt"))
        out.print()
        if len({row["batch"] for row in by_batch}) > 1:
            out.print(tables.phase_table(by_batch, "token", f"tokens/s against batch, prompt {first_prompt}", "batch"))
            out.print()
    if any(row["drafts"] for row in figures.get("rows", ())):
        out.print(tables.drafts_table(figures["rows"]))
        out.print()
    if figures.get("memory"):
        out.print(tables.memory_table(figures["memory"]))
        out.print()
    roof = figures["roof"]
    out.print(tables.roof_table(roof))
    for note in dict.fromkeys(figures.get("notes", [])):
        out.print(f"note: {note}", soft_wrap=True)
    for what, load_then in (("the figures were", figures["load"]), ("the roof was", roof["load"])):
        if tables.is_busy(load_then, os.cpu_count()):
            out.print(f"note: {what} measured on a busy machine (load {load_then:.1f}) and cannot be trusted")


def write(folder: Path, figures: dict[str, Any]) -> None:
    """`bench.json`, and the times in the report beside it that is about the same model."""
    path = folder / "bench.json"
    write_whole(path, (to_json(figures, indent=2) + "\n").encode())
    console().print(f"\nwritten: {path}", soft_wrap=True)
    if figures.get("rows") and add_to_report(folder, figures):
        console().print(f"the times are now part of the report in {folder}", soft_wrap=True)


def add_to_report(folder: Path, figures: dict[str, Any]) -> bool:
    """Put the times into the report that `rheostat eval --out` left in this folder, if it is about the same model."""
    from rheostat.report.schema import FILE, read
    from rheostat.report.times import times
    from rheostat.report.writing import model_key
    from rheostat.report.writing import write as write_report

    if not (folder / FILE).is_file():
        return False
    report = read(folder / FILE)
    if model_key(report) is None or model_key(report) != model_key(figures):
        return False
    write_report(folder, report | {"bench": times(figures), "bench_provenance": figures["provenance"]})
    return True
