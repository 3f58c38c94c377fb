"""Times in a report: only in one of the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

from rheostat.commands import timings
from tests.report.sample import put, sample

FIGURES = {
    "rows": [],
    "settings": {"prompts": [16], "batch": [1]},
    "provenance": {"artifact_digest": "a of models/dial"},
}


def test_a_report_of_another_model_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not timings.add_to_report(tmp_path, FIGURES)  # there is none
    put(tmp_path, sample("words", model="models/other"))
    before = (tmp_path / "report.json").read_bytes()
    assert not timings.add_to_report(tmp_path, FIGURES)
    assert not timings.add_to_report(tmp_path, FIGURES | {"provenance": {}})
    assert (tmp_path / "report.json").read_bytes() == before
    put(tmp_path, sample("words"))
    written = []
    monkeypatch.setattr("rheostat.report.writing.write", lambda folder, report: written.append(report))
    assert timings.add_to_report(tmp_path, FIGURES)
    assert written[0]["bench_provenance"] == FIGURES["provenance"]


def test_figures_without_rows_are_written_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    put(tmp_path, sample("words"))
    timings.write(tmp_path, FIGURES)
    assert f"written: {tmp_path / 'bench.json'}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "report.json"]
