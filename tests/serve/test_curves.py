"""Quality against compute, as the page draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rheostat.errors import SettingError
from rheostat.serve.curves import curves, find_report


def run(kind: str, compute: float, ratio: float | None) -> dict[str, Any]:
    return {"kind": kind, "compute": compute, "ratio": ratio}


def test_lines_fall_from_the_dense_model():
    runs = [run("dial", 0.7, 1.4), run("static", 0.8, 1.5), run("dial", 0.9, 1.1), run("dial", 1.0, 1.0)]
    (found,) = curves({"texts": [{"name": "novels", "runs": runs}]})  # type: ignore[typeddict-item]
    assert found["text"] == "novels"
    assert [line["kind"] for line in found["lines"]] == ["dial", "static"]
    assert [(p["compute"], p["ratio"]) for p in found["lines"][0]["points"]] == [(1.0, 1.0), (0.9, 1.1), (0.7, 1.4)]


def test_a_text_without_a_measured_dial_is_left_out():
    texts = [{"name": "a", "runs": [run("static", 0.8, 1.5)]}, {"name": "b", "runs": [run("dial", 0.8, None)]}]
    assert curves({"texts": texts}) == []  # type: ignore[typeddict-item]


def test_the_report_is_the_one_given_or_the_models_own(tmp_path: Path):
    assert find_report(str(tmp_path)) is None
    own = tmp_path / "report" / "report.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert find_report(str(tmp_path)) == own
    assert find_report("elsewhere", str(own.parent)) == find_report("elsewhere", str(own)) == own
    with pytest.raises(SettingError, match="report="):
        find_report(str(tmp_path), str(tmp_path / "none"))
