"""Several reports in one page: one table, curves over each other, and what keeps them from being compared.

Only what was measured on the same tokens, against the same dense model, is drawn in one panel. Everything else stands
apart, and a sentence says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.report import curves, markdown, page, tables
from rheostat.report.curves import FLOPS, Point
from rheostat.report.notes import measured, method_name
from rheostat.report.schema import FILE, Report, Text
from rheostat.report.style import PANEL_INCHES, SERIES_STYLES, drawing, grid, legend_below, shorten, svg
from rheostat.report.tables import Table
from rheostat.report.writing import base_key, model_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of the things compared."""

    name: str
    """Different from all others."""
    source: str
    """Where the report was found, or the artifact that has none."""
    report: Report | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Of an artifact without a report: what its manifest says of its origin."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What may be compared: runs of several models on the same tokens against the same dense model."""

    title: str
    parts: tuple[tuple[Entry, Text], ...]


def panels(entries: Sequence[Entry]) -> list[Panel]:
    """Groups of texts that may be drawn together, in order of appearance."""
    groups: dict[tuple[Any, ...], list[tuple[Entry, Text]]] = {}
    for entry in entries:
        for text in entry.report["texts"] if entry.report else ():
            groups.setdefault((_base(entry), *_tokens(entry, text)), []).append((entry, text))
    titles = [parts[0][1]["name"] for parts in groups.values()]
    found = []
    for parts, title in zip(groups.values(), titles, strict=True):
        # The same name twice means other tokens or another base: say whose it is.
        whose = f" ({', '.join(entry.name for entry, _ in parts)})" if titles.count(title) > 1 else ""
        found.append(Panel(title=title + whose, parts=tuple(parts)))
    return found


def _base(entry: Entry) -> str:
    """The dense model; one of its own for a report that does not say."""
    return (base_key(entry.report) if entry.report else None) or f"{UNKNOWN}: {entry.name}"


def _tokens(entry: Entry, text: Text) -> tuple[Any, ...]:
    """The tokens; without a digest nobody knows, so a text is equal to none but by name, seed and size."""
    if "digest" in text:
        return (text["digest"],)
    seed = entry.report["seed"] if entry.report else None
    return (text["name"], text["windows"], text["length"], seed)


def warnings(entries: Sequence[Entry]) -> list[str]:
    """Sentences on what is missing, and on what cannot be compared."""
    found = [f"{entry.name}: no report there; it is left out of the curves." for entry in entries if not entry.report]
    reported = [entry for entry in entries if entry.report is not None]
    bases: dict[str, list[str]] = {}
    for entry in reported:
        bases.setdefault(_base(entry), []).append(entry.name)
    if len(bases) > 1:
        groups = "; ".join(f"{', '.join(names)} ({_short(base)})" for base, names in bases.items())
        found.append(
            f"Different base models: {groups}. Their ratios are to different dense models and are not overlaid."
        )
    found += _text_warnings(reported)
    models: dict[str, list[str]] = {}
    for entry in reported:
        if entry.report and (key := model_key(entry.report)):
            models.setdefault(key, []).append(entry.name)
    found += [f"The same model: {' and '.join(names)}." for names in models.values() if len(names) > 1]
    versions = {str(_provenance(entry).get("rheostat", UNKNOWN)) for entry in reported}
    if len(versions) > 1:
        found.append(f"Measured with different versions of rheostat: {', '.join(sorted(versions))}.")
    return found


def _provenance(entry: Entry) -> dict[str, Any]:
    return entry.report.get("provenance", {}) if entry.report else entry.facts


def _text_warnings(reported: Sequence[Entry]) -> list[str]:
    found = []
    by_name: dict[str, dict[tuple[Any, ...], list[str]]] = {}
    for entry in reported:
        for text in entry.report["texts"] if entry.report else ():
            by_name.setdefault(text["name"], {}).setdefault(_tokens(entry, text), []).append(entry.name)
    for name, kinds in by_name.items():
        names = [one for group in kinds.values() for one in group]
        if len(kinds) > 1:
            groups = " and ".join(", ".join(group) for group in kinds.values())
            found.append(f"Text {name}: {groups} saw different tokens and are not overlaid.")
        elif len(names) > 1 and len(next(iter(kinds))) > 1:
            found.append(f"Text {name}: no digest in the reports; taken for the same by its name, size and seed.")
        missing = [entry.name for entry in reported if entry.name not in names]
        if missing:
            found.append(f"Text {name}: not measured for {', '.join(missing)}.")
    return found


def _short(base: str) -> str:
    return base if base.startswith(UNKNOWN) else f"digest {base[:12]}"


# -- the table, the picture, the pages


def table(entries: Sequence[Entry]) -> Table:
    """Every setting of every model, text by text."""
    rows = []
    for panel in panels(entries):
        for entry, text in panel.parts:
            for run in text["runs"]:
                if run["kind"] not in ("dense", "dial"):
                    continue
                ratio = "1" if run["kind"] == "dense" else tables.ratio(run)
                rows.append(
                    (
                        panel.title,
                        entry.name,
                        f"{run['asked']:g}",
                        f"{run['compute']:.3f}",
                        ratio,
                        tables.number(run["perplexity"], ".2f"),
                        tables.with_error(run["accuracy"], run.get("accuracy_error"), is_share=True),
                        tables.with_error(run["agreement"], run.get("agreement_error"), is_share=True),
                    )
                )
    headings = (
        "text",
        "model",
        "asked",
        "spent",
        "ratio to dense",
        "perplexity",
        "accuracy",
        "same top token as dense",
    )
    return Table(headings=headings, rows=tuple(rows), num_words=2, strong=4)


def figure(entries: Sequence[Entry], shown: Sequence[Panel]) -> Figure:
    """Perplexity ratio against FLOPs spent: a panel for each comparable group, a curve for each model."""
    names = [entry.name for entry in entries]
    drawn, axes = grid(len(shown), PANEL_INCHES, extra=0.45 + 0.22 * (len(names) // 3))
    for i, (axis, panel) in enumerate(zip(axes, shown, strict=True)):
        everything: list[Point] = []
        for entry, text in panel.parts:
            runs = [run for run in text["runs"] if run["kind"] in ("dense", "dial")]
            points = [point for run in runs if (point := curves.point_of(run, FLOPS)) is not None]
            style = dict(
                zip(("color", "marker"), SERIES_STYLES[names.index(entry.name) % len(SERIES_STYLES)], strict=True)
            )
            curves.draw_line(axis, points, shorten(entry.name, 30), {**style, "linewidth": 1.8, "markersize": 6})
            everything += points
        curves.star(axis, [point for point in everything if point.x == 1.0 and point.y == 1.0][:1])
        curves.ratio_axis(axis, everything)
        curves.cost_axis(axis, FLOPS)
        axis.set_title(shorten(panel.title, 50))
        if i % 2 == 0:
            axis.set_ylabel(curves.RATIO_LABEL)
    legend_below(drawn, axes, columns=3)
    return drawn


def origins(entries: Sequence[Entry]) -> list[tuple[str, Table]]:
    """(title, facts) of each entry."""
    found = []
    for entry in entries:
        facts = tables.provenance(_provenance(entry))
        first = [("source", entry.source)]
        if entry.report:
            first += [("method", method_name(entry.report))]
            first += [(f"text {text['name']}", measured(text)) for text in entry.report["texts"]]
        found.append((entry.name, Table(headings=facts.headings, rows=(*first, *facts.rows), num_words=2)))
    return found


TITLE = "Quality against compute, compared"
CAPTION = "Perplexity as a ratio to each model's own dense model. Bars are one standard error, paired with dense."
PICTURE = "comparison.png"


def to_markdown(entries: Sequence[Entry]) -> str:
    """The comparison for GitHub; the picture is `comparison.png`."""
    parts = [f"# {TITLE}"]
    if found := warnings(entries):
        parts.append("\n".join(f"- {markdown.escape(line)}" for line in found))
    if panels(entries):
        parts += [f"![{TITLE}]({PICTURE})", CAPTION]
    parts += ["## Figures", markdown.table(table(entries)), "## Where they come from"]
    for name, facts in origins(entries):
        parts += [f"### {markdown.escape(name)}", markdown.table(facts, is_code=True)]
    return "\n\n".join(parts) + "\n"


def to_html(entries: Sequence[Entry]) -> str:
    """The comparison as a page that needs nothing else."""
    parts = [f"<h1>{TITLE}</h1>"]
    if found := warnings(entries):
        parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in found)}</ul>")
    with drawing():
        drawn = [
            svg(figure(entries, [panel]), f"panel{i}", f"{TITLE}: {panel.title}")
            for i, panel in enumerate(panels(entries))
        ]
    inside = "\n".join(f"<div>{one}</div>" for one in drawn)
    kind = "panels one" if len(drawn) == 1 else "panels"
    if drawn:
        parts.append(f'<figure><div class="{kind}">{inside}</div><figcaption>{escape(CAPTION)}</figcaption></figure>')
    parts += ["<h2>Figures</h2>", page.html_table(table(entries)), "<h2>Where they come from</h2>"]
    for name, facts in origins(entries):
        parts += [f"<h3>{escape(name)}</h3>", page.html_table(facts, is_facts=True)]
    return page.document(TITLE, parts)


def distinct(sources: Sequence[str]) -> list[str]:
    """A short name for each source: the last parts of its path, as many as tell it from the others."""
    paths = [_named_parts(Path(source).expanduser().resolve()) for source in sources]
    names = []
    for i, parts in enumerate(paths):
        others = paths[:i] + paths[i + 1 :]
        length = next((k for k in range(1, len(parts)) if all(parts[-k:] != one[-k:] for one in others)), len(parts))
        names.append("/".join(parts[-length:]))
    return [name if names.count(name) == 1 else f"{name} [{i + 1}]" for i, name in enumerate(names)]


def _named_parts(path: Path) -> tuple[str, ...]:
    """The parts that name something: `dial/report/report.json` is the report of `dial`."""
    parts = path.parts
    for generic in (FILE, "report"):
        if len(parts) > 2 and parts[-1] == generic:
            parts = parts[:-1]
    return parts
