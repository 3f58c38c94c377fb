"""Compare measured models in one page: one table, their curves over each other, where each comes from.

Takes reports that `rheostat eval --out` wrote, folders that hold one, or adapted models whose report lies in their
folder (as `rheostat eval DIR --out DIR/report` leaves it). Reports on other text or of other base models are
not drawn over each other, and the page says so. Nothing is measured here.

Example:
  rheostat report smol-dial other-dial --out comparison
  rheostat report figures/report.json older/report.json --json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.config import Common, setting
from rheostat.errors import SettingError, bad_setting
from rheostat.folders import check_output
from rheostat.terminal import console

if TYPE_CHECKING:
    from rheostat.report.compare import Entry

MANIFEST = "rheostat.json"
ALLOWED = "a report.json, a folder that holds one, or an adapted model"


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat report`."""

    sources: tuple[str, ...] = setting(help=f"what to compare: {ALLOWED}", flag=False)
    out: str | None = setting(None, help="folder for comparison.html, .md and .png (default: none are written)")


def run(config: Config) -> dict[str, Any]:
    """Read the reports, print the table and what to bear in mind, and write the pages if asked.

    Raises:
        SettingError: a source is none, none has a report, or the folder cannot be written.
    """
    from rheostat.report import compare

    if not config.sources:
        raise bad_setting("sources", list(config.sources), f"at least one of {ALLOWED}")
    if config.out is not None:
        check_output(config.out, overwrite=True, is_replaced=False)
    names = compare.distinct(config.sources)
    entries = [find(source, name) for source, name in zip(config.sources, names, strict=True)]
    if not any(entry.report for entry in entries):
        first = config.sources[0]
        raise SettingError(f"sources: none has a report; make one: rheostat eval {first} --out {first}/report")
    table, warnings = compare.table(entries), compare.warnings(entries)
    _show(table, warnings)
    files = [] if config.out is None else _write(Path(config.out), entries)
    figures: dict[str, Any] = {
        "sources": [{"name": entry.name, "source": entry.source, "report": entry.report} for entry in entries],
        "warnings": warnings,
        "files": [str(file) for file in files],
    }
    if config.json:
        from rheostat.report import origin

        figures["provenance"] = origin(seed=config.seed)
    return figures


def find(source: str, name: str) -> Entry:
    """What a source holds.

    Raises:
        SettingError: it is none, or its report cannot be read.
    """
    from rheostat.report.compare import Entry
    from rheostat.report.schema import FILE, read

    path = Path(source).expanduser()
    if path.is_file():
        return Entry(name=name, source=source, report=read(path))
    if not path.is_dir():
        raise bad_setting("sources", source, f"{ALLOWED}: there is no such file or folder")
    if (path / FILE).is_file():
        return Entry(name=name, source=str(path / FILE), report=read(path / FILE))
    below = sorted(path.glob(f"*/{FILE}"))
    if (path / "report" / FILE) in below:
        below = [path / "report" / FILE]
    if len(below) > 1:
        raise bad_setting("sources", source, f"with one report below it, not {len(below)}: name the one you mean")
    if below:
        return Entry(name=name, source=str(below[0]), report=read(below[0]))
    if not (path / MANIFEST).is_file():
        raise bad_setting("sources", source, f"{ALLOWED}: this folder has neither")
    from rheostat.artifact import read_manifest

    return Entry(name=name, source=source, facts=read_manifest(path)["report"].get("provenance", {}))


def _show(table: Any, warnings: Sequence[str]) -> None:
    from rich.table import Table

    for text in dict.fromkeys(row[0] for row in table.rows):  # one for each text, whose name may be long
        shown = Table(title=text, title_justify="left", title_style="", box=None, pad_edge=False)
        for i, heading in enumerate(table.headings[1:], 1):
            shown.add_column(heading, justify="left" if i < table.num_words else "right", no_wrap=i == 1)
        for row in table.rows:
            if row[0] == text:
                shown.add_row(*row[1:])
        console().print(shown)
    for line in warnings:
        console().print(f"note: {line}", soft_wrap=True)


def _write(out: Path, entries: Sequence[Entry]) -> list[Path]:
    from rheostat.report import compare, write_whole
    from rheostat.report.style import drawing, png

    files = {
        "comparison.html": compare.to_html(entries).encode(),
        "comparison.md": compare.to_markdown(entries).encode(),
    }
    if shown := compare.panels(entries):
        with drawing():
            files[compare.PICTURE] = png(compare.figure(entries, shown))
    for name, content in files.items():
        write_whole(out / name, content)
    console().print("\nwritten: " + ", ".join(str(out / name) for name in files), soft_wrap=True)
    return [out / name for name in files]
