from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.eval import plots


def row(kind: str, compute: float, ratio: float, error: float = 0.01) -> dict:
    return {"kind": kind, "compute": compute, "ratio": ratio, "ratio_error": error}


def report(*texts: list[dict]) -> dict:
    named = [{"name": f"text {i}", "runs": [row("dense", 1.0, 1.0, 0.0), *runs]} for i, runs in enumerate(texts)]
    return {"model": "models/tiny", "method": {"name": "some"}, "texts": named}


RUNS = [row("dial", 0.8, 1.2), row("static", 0.8, 1.5), row("random", 0.81, 2.2)]


@pytest.mark.parametrize("texts", [[[]], [RUNS], [RUNS, RUNS[:1], []]])
def test_a_panel_for_each_text(texts: list[list[dict]], tmp_path: Path):
    path = tmp_path / "pareto.png"
    plots.pareto(report(*texts), path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
    assert width == pytest.approx(plots.PANEL_INCHES[0] * len(texts) * 160, abs=2)
    assert height == pytest.approx(plots.PANEL_INCHES[1] * 160, abs=2)


def test_what_a_panel_shows():
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    plots._draw(panel, report(RUNS)["texts"][0]["runs"], "some")
    labels = panel.get_legend_handles_labels()[1]
    assert set(labels) == {"dense", "some, by token", "static", "random"}
    assert "FLOPs" in panel.get_xlabel()
    assert panel.get_yscale() == "log"
    low, high = panel.get_ylim()
    assert low < 1 < 2.21 < high


def test_colours_belong_to_kinds_not_to_places():
    from matplotlib.figure import Figure

    def colours(runs: list[dict]) -> dict[str, str]:
        panel = Figure().subplots()
        plots._draw(panel, runs, "some")
        return {c.get_label(): c.lines[0].get_color() for c in panel.containers}

    dense = row("dense", 1.0, 1.0)
    wider = [dense, row("static", 0.9, 1.1), row("random", 0.8, 1.2)]
    assert colours(wider) == colours([dense, row("static", 0.7, 1.1), row("random", 0.8, 1.2)])


@given(st.floats(0.5, 1), st.floats(1.01, 1000))
def test_ticks_keep_apart(low: float, high: float):
    found = plots.ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low <= tick <= high for tick in found)
    assert all(b / a > (high / low) ** plots.MIN_GAP * 0.999 for a, b in itertools.pairwise(found))


def test_an_unwritable_place(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="a file that can be written"):
        plots.pareto(report(RUNS), tmp_path / "file" / "pareto.png")
