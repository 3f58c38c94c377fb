"""`report.md`: the report as a page that reads well on GitHub, with the pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rheostat.report import tables
from rheostat.report.notes import measured, method_name, notes
from rheostat.report.pictures import Picture, pictures
from rheostat.report.schema import Report
from rheostat.report.summary import summary
from rheostat.report.tables import Table


def markdown(report: Report) -> str:
    """The whole page."""
    method = method_name(report)
    shown = {picture.name: picture for picture in pictures(report)}
    parts = [f"# {escape(Path(report['model']).name)}: quality against compute", introduction(report)]
    if (settings := summary(report)) is not None:
        parts.append(table(settings))
    if "pareto" in shown:
        parts.append(image(shown.pop("pareto")))
    for text in report["texts"]:
        parts += [f"## {escape(text['name'])}", f"{measured(text)}."]
        parts.append(table(tables.quality(text, method)))
        if (costs := tables.cost(text)) is not None:
            parts.append(table(costs))
    if (scores := tables.tasks(report)) is not None:
        parts += ["## Tasks", table(scores)]
    if (times := tables.bench(report)) is not None:
        parts += ["## Times", table(times)]
    for picture in shown.values():
        parts += [f"## {picture.title}", image(picture), escape(picture.caption)]
    parts += ["## Notes", "\n".join(f"- {escape(line)}" for line in notes(report))]
    for title, origin in origins(report):
        parts += [f"## {title}", table(tables.provenance(origin), is_code=True)]
    return "\n\n".join(parts) + "\n"


def introduction(report: Report) -> str:
    """One paragraph: what was measured."""
    base = report.get("base", {}).get("hub_id") or report.get("base", {}).get("name")
    of = f", made from {escape(str(base))}" if base else ""
    who = f"`{code(report['model'])}` ({escape(method_name(report))}{of})"
    return (
        f"{who} at several settings of its dial. "
        "*Compute* is the fraction of the dense model's FLOPs that a token may cost; *ratio* is perplexity divided "
        "by the dense model's on the same text, so 1 is as good as dense and more is worse."
    )


def origins(report: Report) -> list[tuple[str, dict[str, object]]]:
    """(title, provenance) of everything in the report."""
    found = [
        ("Provenance", report.get("provenance")),
        ("Provenance of the tasks", report.get("tasks_provenance")),
        ("Provenance of the times", report.get("bench_provenance")),
    ]
    return [(title, origin) for title, origin in found if origin]


def image(picture: Picture, folder: str = "") -> str:
    """The picture, shown."""
    return f"![{escape(picture.title)}]({folder}{picture.name}.png)"


def table(one: Table, *, is_code: bool = False) -> str:
    """A table in GitHub's Markdown; with `is_code`, the last column as code."""
    marks = ["---" if i < one.num_words else "---:" for i in range(len(one.headings))]
    rows = [_cells(one, row, is_code) for row in one.rows]
    return "\n".join(_row(row) for row in ([escape(h) for h in one.headings], marks, *rows))


def _cells(one: Table, row: Sequence[str], is_code: bool) -> list[str]:
    cells = [escape(cell) for cell in row]
    if one.strong is not None:
        cells[one.strong] = f"**{cells[one.strong]}**"
    if is_code:
        cells[-1] = f"`{code(row[-1])}`".replace("|", "\\|")
    return cells


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text as itself: nothing in it is taken for Markdown or HTML, and it is one line."""
    text = re.sub(r"([\\`*\[\]<>|~$])|(?<!\w)(_)|(_)(?!\w)", lambda found: "\\" + found.group(), " ".join(text.split()))
    return text.replace("&", "&amp;")


def code(text: str) -> str:
    """Text for inside a pair of backticks."""
    return " ".join(text.split()).replace("`", "'")
