from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.report import curves
from rheostat.report.curves import BYTES, FLOPS, Point
from rheostat.report.style import DPI, PANEL_INCHES, drawing, new_figure, png
from tests.report.sample import run, sample


def size(image: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    assert image.startswith(b"\x89PNG")
    return int.from_bytes(image[16:20]), int.from_bytes(image[20:24])


@pytest.mark.parametrize(("num_texts", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2)])
@pytest.mark.parametrize("axis", [FLOPS, BYTES])
def test_a_panel_for_each_text(num_texts: int, columns: int, rows: int, axis: curves.Axis):
    texts = sample(*"abc"[:num_texts])["texts"]
    with drawing():
        width, height = size(png(curves.against(texts, "some", axis)))
    assert width == pytest.approx(PANEL_INCHES[0] * columns * DPI, abs=2)
    assert height == pytest.approx((PANEL_INCHES[1] * rows + 0.45) * DPI, abs=2)


def drawn(runs: list[dict[str, Any]], axis: curves.Axis = FLOPS) -> Any:
    with drawing():
        panel = new_figure(4, 3).subplots()
        curves.draw_runs(panel, runs, "some", axis)
    return panel


def test_what_a_panel_shows():
    panel = drawn(sample()["texts"][0]["runs"])
    assert set(panel.get_legend_handles_labels()[1]) == {"Pareto front", "dense", "some, by token", "static", "random"}
    assert "FLOPs" in panel.get_xlabel()
    assert panel.get_yscale() == "log"
    low, high = panel.get_ylim()
    assert low < 1 < 2.41 < high


def test_colours_belong_to_kinds_not_to_places():
    def colours(runs: list[dict[str, Any]]) -> dict[str, str]:
        return {c.get_label(): c.lines[0].get_color() for c in drawn(runs).containers}

    dense = run("dense", 1.0, 1.0)
    wider = [dense, run("static", 0.9, 1.1), run("random", 0.8, 1.2)]
    assert colours(wider) == colours([dense, run("static", 0.7, 1.1), run("random", 0.8, 1.2)])


def test_runs_without_the_figure_are_left_out():
    missing = run("dial", 0.8, 1.2)
    del missing["bytes_per_token"]
    assert curves.point_of(missing, BYTES) is None
    assert curves.point_of(run("dial", 0.8, 1.2) | {"ratio": None}, FLOPS) is None
    assert curves.point_of(run("dial", 0.8, 1.2) | {"ratio_error": None}, FLOPS) == Point(0.8, 1.2, 0.0)
    drawn([missing, run("dial", 0.8, 1.2) | {"ratio": None}], BYTES)


def test_the_front_is_what_nothing_beats():
    dense, cheap, beaten, dear = Point(1.0, 1.0), Point(0.7, 1.5), Point(0.8, 1.6), Point(1.1, 1.0)
    assert curves.front([dense, beaten, cheap, dear]) == [cheap, dense]
    rival = Point(0.7 * 0.999, 2.0)  # hardly cheaper, much worse
    assert curves.front([dense, cheap, rival]) == [cheap, dense]
    assert curves.front([]) == []


@settings(deadline=None)  # a busy machine is no fault of ours
@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(1, 9)), min_size=1, max_size=12))
def test_quality_rises_along_the_front(pairs: list[tuple[float, float]]):
    best = curves.front([Point(x, y) for x, y in pairs])
    assert min(y for _, y in pairs) == min(p.y for p in best)
    assert all(a.y >= b.y or b.x <= a.x * (1 + curves.SAME_COST) for a, b in itertools.pairwise(best))


@settings(deadline=None)  # a busy machine is no fault of ours
@given(st.floats(0.5, 1), st.floats(1.01, 1000))
def test_ticks_keep_apart(low: float, high: float):
    found = curves.ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low <= tick <= high for tick in found)
    assert all(b / a > (high / low) ** curves.MIN_GAP * 0.999 for a, b in itertools.pairwise(found))


def test_times_stand_beside_the_quality_of_their_setting():
    report = sample()
    sides = curves.timed(report["bench"], report["texts"][0]["runs"], "tpot_ms")
    assert sides["stock"] == [Point(70.0, 1.0, 0.0, 70.0, 70.0)]
    assert [(p.x, p.y) for p in sides["dial"]] == [(80, 1.0), (72, 1.05), (64, 1.2)]
    assert sides["dial"][1].x_high == pytest.approx(76.5)
    assert list(curves.timed(report["bench"], report["texts"][0]["runs"], "ttft_ms")) == ["dial"]
    assert curves.clocks(report) == ["tpot_ms", "ttft_ms"]
    assert curves.clocks(report | {"bench": []}) == []  # type: ignore[operator]


def test_a_setting_that_was_not_scored_has_no_place():
    report = sample()
    row = report["bench"][1] | {"compute": 0.55}
    assert curves.timed([row], report["texts"][0]["runs"], "tpot_ms") == {}


@pytest.mark.parametrize(("side", "series"), [("dial 0.7", "dial"), ("dial", "dial"), ("llama.cpp q8", "llama.cpp q8")])
def test_series(side: str, series: str):
    assert curves.series_name({"side": side, "compute": 0.7}) == series


def test_a_panel_for_each_task():
    tasks = sample()["tasks"]
    more = [task | {"task": name} for task in tasks for name in ("one", "two")]
    names = curves.task_names([*more, tasks[0] | {"task": "void", "score": None}])
    assert names == ["one: accuracy", "two: accuracy"]
    with drawing():
        figure = curves.against_tasks(more, names)
        assert [panel.get_title() for panel in figure.axes] == names
        assert size(png(figure))[0] == pytest.approx(PANEL_INCHES[0] * 2 * DPI, abs=2)
