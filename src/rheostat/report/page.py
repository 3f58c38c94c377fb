"""`report.html`: the report as one file that needs nothing else. It follows light and dark, and fits a phone.

All words from outside (names, paths, tokens) go through `html.escape`. There is no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rheostat.report import tables, usage
from rheostat.report.markdown import origins
from rheostat.report.notes import measured, method_name, notes
from rheostat.report.pictures import Picture, pictures
from rheostat.report.schema import Passage, Report
from rheostat.report.style import drawing, svg
from rheostat.report.summary import summary
from rheostat.report.tables import Table

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1b1b; --quiet: #666a70; --grid: #dcdcdc; --paper: #ffffff; --soft: #f4f4f2;
  --dial: #0072b2; --front: #f0e442; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --quiet: #a5a9af; --grid: #3d4248; --paper: #16181b; --soft: #202327;
    --dial: #4db1ec; --front: #6a6a55; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--grid); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { max-width: 46rem; }
p.small, figcaption, li { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: bottom; }
td { white-space: nowrap; }
th { font-weight: 600; color: var(--quiet); max-width: 9rem; }
th.word, td.word { text-align: left; }
td.strong { font-weight: 700; }
table.facts td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
table.facts td:first-child { white-space: nowrap; color: var(--quiet); }
table.facts td:last-child, code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .85rem; }
figure { margin: .6rem 0 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem; }
.panels.one { grid-template-columns: minmax(0, 44rem); }
svg { width: 100%; height: auto; display: block; stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif !important; }
.tokens { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9rem; line-height: 1.75;
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .7rem .8rem; border-radius: .4rem; }
.tokens span { padding: .12em 0; }
.scale { display: inline-flex; align-items: center; gap: .5rem; font-size: .85rem; color: var(--quiet); }
.scale i { width: 8rem; height: .8rem; border-radius: .2rem; }
summary { cursor: pointer; margin: .5rem 0; }
"""


def page(report: Report) -> str:
    """The whole page."""
    name = Path(report["model"]).name
    method = method_name(report)
    shown = {picture.name: picture for picture in pictures(report)}
    parts = [f"<h1>{escape(name)}: quality against compute</h1>", _introduction(report)]
    if (settings := summary(report)) is not None:
        parts.append(html_table(settings))
    if "pareto" in shown:
        parts.append(figure(shown.pop("pareto")))
    for text in report["texts"]:
        parts += [f"<h2>{escape(text['name'])}</h2>", f'<p class="small">{escape(measured(text))}</p>']
        parts.append(html_table(tables.quality(text, method)))
        if (costs := tables.cost(text)) is not None:
            parts.append(html_table(costs))
    for title, table in (("Tasks", tables.tasks(report)), ("Times", tables.bench(report))):
        if table is not None:
            parts += [f"<h2>{title}</h2>", html_table(table)]
    for picture in shown.values():
        parts += [f"<h2>{escape(picture.title)}</h2>"]
        parts.append(_passages(report) if picture.name == "tokens" else figure(picture))
    parts += ["<h2>Notes</h2>", f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in notes(report))}</ul>"]
    for title, origin in origins(report):
        parts += [f"<h2>{escape(title)}</h2>", html_table(tables.provenance(origin), is_facts=True)]
    return document(f"{name}: quality against compute", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A page of these parts, which are HTML; `title` is plain text."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
    )
    return head + "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"


def _introduction(report: Report) -> str:
    base = report.get("base", {}).get("hub_id") or report.get("base", {}).get("name")
    of = f", made from {escape(str(base))}" if base else ""
    who = f"<code>{escape(report['model'])}</code> ({escape(method_name(report))}{of})"
    return (
        f"<p>{who} at several settings of its dial. "
        "<em>Compute</em> is the fraction of the dense model&#39;s FLOPs that a token may cost; <em>ratio</em> is "
        "perplexity divided by the dense model&#39;s on the same text, so 1 is as good as dense and more is worse.</p>"
    )


def html_table(table: Table, *, is_facts: bool = False) -> str:
    """A table that scrolls on its own where the screen is narrow."""
    head = "".join(f'<th scope="col"{_class(table, i)}>{escape(one)}</th>' for i, one in enumerate(table.headings))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{_class(table, i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    if is_facts:
        return f'<div class="wide"><table class="facts"><tbody>\n{rows}\n</tbody></table></div>'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _class(table: Table, column: int) -> str:
    if column < table.num_words:
        return ' class="word"'
    return ' class="strong"' if column == table.strong else ""


def figure(picture: Picture) -> str:
    """A picture, its panels as drawings of their own, so that they stack on a narrow screen."""
    with drawing():
        drawn = [
            svg(draw(), f"{picture.name}{i}", f"{picture.title}: {about}")
            for i, (about, draw) in enumerate(picture.panels)
        ]
    kind = "panels one" if len(drawn) == 1 else "panels"
    inside = "\n".join(f"<div>{one}</div>" for one in drawn)
    return f'<figure><div class="{kind}">{inside}</div><figcaption>{escape(picture.caption)}</figcaption></figure>'


def _passages(report: Report) -> str:
    found = [(text["name"], text["passage"]) for text in report["texts"] if text.get("passage", {}).get("rows")]
    return "\n".join(_passage(name, one, is_first=i == 0) for i, (name, one) in enumerate(found))


def _passage(name: str, passage: Passage, *, is_first: bool) -> str:
    """Coloured text for each setting of the dial, the middle one open."""
    low = min(min(row["widths"]) for row in passage["rows"])
    middle = usage.middle_row(passage)
    parts = [f"<h3>{escape(name)}</h3>"]
    for row in passage["rows"]:
        spans = "".join(
            _token(token, width, low) for token, width in zip(passage["tokens"], row["widths"], strict=True)
        )
        is_open = " open" if row is middle and is_first else ""
        title = f"asked {row['asked']:g}, spent {row['compute']:.3f} on these tokens"
        parts.append(f'<details{is_open}><summary>{title}</summary><div class="tokens">{spans}</div></details>')
    stops = ", ".join(usage.colour_of(low + (1 - low) * i / 8, low)[0] for i in range(9))
    parts.append(
        f'<div class="scale">FFN width {low:.0%} <i style="background: linear-gradient(90deg, {stops})"></i> 100%</div>'
    )
    return "\n".join(parts)


def _token(token: str, width: float, low: float) -> str:
    ground, ink = usage.colour_of(width, low)
    shown = escape("".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in token))
    # A line end inside a coloured span would be invisible.
    shown = shown.replace("\n", "↵\n")
    return f'<span style="background:{ground};color:{ink}" title="{width:.0%}">{shown}</span>'
