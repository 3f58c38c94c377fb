"""A report as files: `report.json`, `report.md`, `report.html` and the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rheostat.errors import SettingError
from rheostat.report import to_json, write_whole
from rheostat.report.markdown import markdown
from rheostat.report.page import page
from rheostat.report.pictures import pictures
from rheostat.report.schema import FILE, check, read
from rheostat.report.style import drawing, png

MARKDOWN, PAGE = "report.md", "report.html"
PICTURES = (
    "pareto", "bytes", "milliseconds", "first_token", "tasks", "experts", "positions", "tokens",
)  # fmt: skip
"""Every name a picture may have: one that a new report does not have is taken away, lest it show old figures."""

CARRIED = ("bench", "bench_provenance", "tasks", "tasks_provenance")
"""What other commands measured of the same model, and a new measurement of quality does not make wrong."""


def write(folder: Path, figures: Mapping[str, Any]) -> list[Path]:
    """Write a report into `folder`, over one that is there. Returns the files, `report.json` first.

    Raises:
        SettingError: `figures` is no report, or the folder cannot be written.
    """
    text = to_json(figures, indent=2) + "\n"
    report = read_back(text)
    shown = pictures(report)
    assert {picture.name for picture in shown} <= set(PICTURES)
    files = {FILE: text.encode(), MARKDOWN: markdown(report).encode(), PAGE: page(report).encode()}
    with drawing():
        files |= {f"{one.name}.png": png(one.whole()) for one in shown}
    for name, content in files.items():
        write_whole(folder / name, content)
    for name in PICTURES:
        if f"{name}.png" not in files:
            (folder / f"{name}.png").unlink(missing_ok=True)
    return [folder / name for name in files]


def read_back(text: str) -> Any:
    """The report that this JSON will be read as: what is written is checked like what is read."""
    import json

    return check(json.loads(text))


def carried(folder: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What the report already in `folder` holds of the same model beyond `figures`, to be kept; empty for none."""
    try:
        old = read(folder / FILE)
    except SettingError:
        return {}
    if model_key(old) is None or model_key(old) != model_key(figures):
        return {}
    kept = {key: old[key] for key in CARRIED if key in old and key not in figures}  # type: ignore[literal-required]
    for part in ("bench", "tasks"):
        if part in figures:  # measured anew, so the old origin goes too
            kept.pop(f"{part}_provenance", None)
        elif part in kept and old.get("provenance"):
            kept.setdefault(f"{part}_provenance", old["provenance"])
    return kept


def model_key(report: Mapping[str, Any]) -> str | None:
    """The digest of the model that a report is about."""
    origin = report.get("provenance") or {}
    return origin.get("artifact_digest") or origin.get("model_digest")


def base_key(report: Mapping[str, Any]) -> str | None:
    """The digest of the dense model behind it."""
    origin = report.get("provenance") or {}
    return origin.get("base_digest") or origin.get("model_digest")
