"""Quality against compute for the page, from the report that `rheostat eval` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rheostat.errors import bad_setting
from rheostat.report import schema

KINDS = ("dial", "static")
"""Of runs that the page shows, and in which order."""


def find_report(model: str, given: str = "") -> Path | None:
    """The report to show: what was given, or the one in the model's own folder.

    Raises:
        SettingError: the one that was given is not there.
    """
    if given:
        path = Path(given).expanduser()
        path = path / schema.FILE if path.is_dir() else path
        if not path.is_file():
            raise bad_setting("report", given, f"a {schema.FILE} of rheostat eval, or its folder")
        return path
    path = Path(model).expanduser() / "report" / schema.FILE
    return path if path.is_file() else None


def curves(report: schema.Report) -> list[dict[str, Any]]:
    """One entry a text, with a line of points for each kind of run; compute falls along a line, from the dense 1."""
    found = []
    for text in report["texts"]:
        lines = []
        for kind in KINDS:
            pairs = {(run["compute"], run["ratio"]) for run in text["runs"] if run["kind"] == kind and run["ratio"]}
            points = [{"compute": 1.0, "ratio": 1.0}]
            points += [{"compute": c, "ratio": r} for c, r in sorted(pairs, reverse=True) if c < 1]
            if len(points) > 1:
                lines.append({"kind": kind, "points": points})
        if lines and lines[0]["kind"] == "dial":
            found.append({"text": text["name"], "lines": lines})
    return found
