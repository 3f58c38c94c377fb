from __future__ import annotations

import re

import pytest

from rheostat.report import markdown
from rheostat.report.schema import check
from rheostat.report.tables import Table
from tests.report.sample import NASTY, old_sample, sample


def tables_of(text: str) -> list[list[str]]:
    """The lines of each table."""
    return [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize("report", [sample(), check(old_sample()), sample(NASTY, model=NASTY)])
def test_every_row_of_a_table_has_as_many_cells_as_its_head(report):
    found = tables_of(markdown.markdown(report))
    assert found
    for table in found:
        assert len({cells(line) for line in table}) == 1, table


def test_what_the_page_holds():
    text = markdown.markdown(sample())
    assert text.startswith("# dial: quality against compute\n")
    assert "made from someone/Tiny" in text
    for name in ("pareto", "bytes", "milliseconds", "first_token", "tasks", "experts", "positions", "tokens"):
        assert text.count(f"]({name}.png)") == 1
    for heading in ("## words", "## others", "## Tasks", "## Times", "## Notes", "## Provenance"):
        assert f"\n{heading}\n" in text
    assert "| command | `rheostat eval models/dial` |" in text
    assert "| command | `rheostat bench models/dial` |" in text
    assert "**1.050 ± 0.010**" in text


def test_an_old_report_shows_what_it_has():
    text = markdown.markdown(check(old_sample()))
    assert "](pareto.png)" in text
    assert "](bytes.png)" not in text
    assert "FLOPs a token" not in text


def test_names_are_not_markdown():
    text = markdown.markdown(sample(NASTY))
    assert "<script>" not in text.replace(r"\<script\>", "")
    assert r"## \<script\>alert('x')\</script\> \| \$a_b\$ &amp; " in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a_b", "a_b"), ("_a_", r"\_a\_"), ("two\nlines", "two lines"), ("`*[x]", r"\`\*\[x\]"), ("a&b", "a&amp;b")],
)
def test_escape(text: str, wanted: str):
    assert markdown.escape(text) == wanted


def test_code_cells_keep_their_cell():
    table = Table(headings=("", "value"), rows=(("x", "a | b `c`"),), num_words=2)
    assert markdown.table(table, is_code=True).splitlines()[-1] == r"| x | `a \| b 'c'` |"
