from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.report.sample import old_sample, put, sample


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two folders with reports on the same text, and an old one."""
    put(tmp_path / "one" / "report", sample("words", model="one"))
    put(tmp_path / "two", sample("words", model="two", scale=1.1))
    (tmp_path / "old.json").write_text(json.dumps(old_sample()))
    return tmp_path


def test_a_comparison(rheostat, reports: Path):
    out = reports / "out"
    done = rheostat("report", reports / "one", reports / "two", reports / "old.json", "--out", out, "--json")
    assert done.status == 0, done.err
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.md", "comparison.png"]
    figures = done.figures
    assert [one["name"] for one in figures["sources"]] == ["one", "two", "old.json"]
    assert figures["sources"][0]["report"] == sample("words", model="one")
    assert figures["sources"][0]["source"] == str(reports / "one" / "report" / "report.json")
    assert any("saw different tokens" in line for line in figures["warnings"])
    assert figures["provenance"]["seed"] == 0
    assert "1.155 ± 0.010" in done.out
    assert "note: Text words: one, two and old.json saw different tokens" in done.out


def test_a_comparison_may_be_written_again(rheostat, reports: Path):
    for _ in range(2):
        done = rheostat("report", reports / "one", reports / "two", "--out", reports / "out")
        assert done.status == 0, done.err


def test_one_report_alone_and_nothing_written(rheostat, reports: Path):
    before = sorted(reports.rglob("*"))
    done = rheostat("report", reports / "two" / "report.json")
    assert done.status == 0, done.err
    assert sorted(reports.rglob("*")) == before


def test_an_artifact_without_a_report_is_pointed_out(rheostat, refused, reports: Path, dial_folder: Path):
    done = rheostat("report", reports / "one", dial_folder, "--out", reports / "out")
    assert done.status == 0, done.err
    assert "note: dial: no report there; it is left out of the curves." in done.out
    digest = json.loads((dial_folder / "rheostat.json").read_text())["report"]["base_digest"]
    assert f"| base digest | `{digest}` |" in (reports / "out" / "comparison.md").read_text()
    assert f"make one: rheostat eval {dial_folder} --out {dial_folder}/report" in refused("report", dial_folder)


def test_bad_sources(refused, reports: Path):
    (reports / "empty").mkdir()
    shutil.copytree(reports / "two", reports / "many" / "a")
    shutil.copytree(reports / "two", reports / "many" / "b")
    (reports / "newer.json").write_text(json.dumps(sample() | {"format": 99}))
    assert "sources: must be given" in refused("report")
    assert "there is no such file or folder" in refused("report", reports / "none")
    assert "this folder has neither" in refused("report", reports / "empty")
    assert "with one report below it, not 2" in refused("report", reports / "many")
    assert "format=99: must be at most 1: upgrade rheostat" in refused("report", reports / "newer.json")
    assert "this is a file" in refused("report", reports / "two", "--out", reports / "old.json")


def test_sources_from_a_file(rheostat, reports: Path):
    (reports / "config.yaml").write_text(f"sources: [{reports / 'one'}, {reports / 'two'}]\n")
    done = rheostat("report", "--config", reports / "config.yaml", "--json")
    assert [one["name"] for one in done.figures["sources"]] == ["one", "two"]
