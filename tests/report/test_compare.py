"""What may be compared is drawn together; what may not stands apart and is said."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from rheostat.report import compare
from rheostat.report.compare import Entry
from rheostat.report.schema import check
from rheostat.report.style import drawing, png
from tests.report.sample import NASTY, old_sample, sample
from tests.report.test_page import read


def entry(name: str, **report: Any) -> Entry:
    texts = report.pop("texts", ("words",))
    return Entry(name=name, source=f"{name}/report.json", report=check(sample(*texts, model=name, **report)))


def titles(*entries: Entry) -> list[str]:
    return [panel.title for panel in compare.panels(entries)]


def test_the_same_tokens_and_base_share_a_panel():
    a, b = entry("a"), entry("b", scale=1.1)
    assert titles(a, b) == ["words"]
    assert compare.warnings([a, b]) == []
    table = compare.table([a, b])
    assert [row[:5] for row in table.rows] == [
        ("words", "a", "1", "1.000", "1"),
        ("words", "a", "0.9", "0.900", "1.050 ± 0.010"),
        ("words", "a", "0.8", "0.800", "1.200 ± 0.010"),
        ("words", "b", "1", "1.000", "1"),
        ("words", "b", "0.9", "0.900", "1.155 ± 0.010"),
        ("words", "b", "0.8", "0.800", "1.320 ± 0.010"),
    ]
    with drawing():
        figure = compare.figure([a, b], compare.panels([a, b]))
        png(figure)
    assert figure.axes[0].get_legend_handles_labels()[1] == ["dense", "a", "b"]


def test_other_base_models_are_not_overlaid():
    a, b = entry("a"), entry("b", base="c" * 64)
    assert titles(a, b) == ["words (a)", "words (b)"]
    (warning,) = compare.warnings([a, b])
    assert warning.startswith("Different base models: a (digest bbbbbbbbbbbb); b (digest cccccccccccc).")


def test_other_tokens_under_the_same_name_are_not_overlaid():
    a, b = entry("a"), entry("b")
    assert b.report is not None
    b.report["texts"][0]["digest"] = "else"
    assert titles(a, b) == ["words (a)", "words (b)"]
    assert compare.warnings([a, b]) == ["Text words: a and b saw different tokens and are not overlaid."]


def test_missing_texts_and_reports_and_twins():
    a, b = entry("a"), entry("b", texts=("words", "more"))
    none = Entry(name="none", source="none", facts={"command": "rheostat adapt x"})
    twin = Entry(name="twin", source="twin", report=a.report)
    warnings = compare.warnings([a, b, none, twin])
    assert warnings == [
        "none: no report there; it is left out of the curves.",
        "Text more: not measured for a, twin.",
        "The same model: a and twin.",
    ]
    assert ("command", "rheostat adapt x") in compare.origins([none])[0][1].rows


def test_versions_are_pointed_out():
    a, b = entry("a"), entry("b")
    assert b.report is not None
    b.report["provenance"]["rheostat"] = "0.2.0"
    assert compare.warnings([a, b]) == ["Measured with different versions of rheostat: 0.1.0, 0.2.0."]


def test_old_reports_are_matched_by_name_size_and_seed_and_that_is_said():
    old = [Entry(name=name, source=name, report=check(old_sample() | {"model": name})) for name in "ab"]
    assert titles(*old) == ["words", "others"]
    assert "Text words: no digest in the reports; taken for the same by its name, size and seed." in compare.warnings(
        old
    )
    assert titles(old[0], entry("new")) == ["words (a)", "others", "words (new)"]


def test_a_report_of_unknown_base_stands_alone():
    a, b = entry("a"), entry("b")
    for one in (a, b):
        assert one.report is not None
        del one.report["provenance"]
    assert titles(a, b) == ["words (a)", "words (b)"]


def test_pages():
    entries = [entry("a"), entry(NASTY, base="c" * 64)]
    text = compare.to_html(entries)
    reader = read(text)
    assert "<script" not in text
    assert reader.fetched == []
    assert len(reader.ids) == len(set(reader.ids))
    assert "Different base models" in "".join(reader.words)
    ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    plain = compare.to_markdown(entries)
    assert "(comparison.png)" in plain
    assert r"### \<script\>" in plain
    assert (text, plain) == (compare.to_html(entries), compare.to_markdown(entries))


def test_a_report_of_tasks_alone_has_no_picture():
    alone = Entry(name="a", source="a", report=check(sample() | {"texts": []}))
    assert compare.panels([alone]) == []
    assert "<svg" not in compare.to_html([alone])
    assert "comparison.png" not in compare.to_markdown([alone])


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/x/a", "/x/b"], ["a", "b"]),
        (["/x/a", "/y/a"], ["x/a", "y/a"]),
        (["/x/a/report/report.json", "/x/b/report"], ["a", "b"]),
        (["/x/a", "/x/a"], ["/x/a [1]", "/x/a [2]"]),
    ],
)
def test_names_tell_sources_apart(sources: list[str], names: list[str]):
    found = compare.distinct(sources)
    assert [name.lstrip("/") for name in found] == [name.lstrip("/") for name in names]
