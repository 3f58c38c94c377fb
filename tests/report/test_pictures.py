from __future__ import annotations

from pathlib import Path

from rheostat.report.pictures import pictures
from rheostat.report.schema import check
from rheostat.report.style import drawing, png
from rheostat.report.writing import PICTURES
from tests.report.sample import old_sample, sample

ALL = ["pareto", "bytes", "milliseconds", "first_token", "tasks", "experts", "positions", "tokens"]


def test_every_picture_that_there_are_figures_for():
    found = pictures(sample())
    assert [one.name for one in found] == ALL
    assert set(ALL) == set(PICTURES)
    assert [len(one.panels) for one in found] == [2, 2, 2, 2, 1, 4, 4, 1]
    assert [about for about, _ in found[5].panels][:2] == ["words at 0.9", "words at 0.8"]


def test_no_picture_without_figures():
    assert [one.name for one in pictures(check(old_sample()))] == ["pareto"]
    assert [one.name for one in pictures(sample() | {"texts": []})] == ["tasks"]
    half = sample()
    del half["texts"][0]["use"][0]["positions"]
    del half["texts"][1]["runs"][0]["bytes_per_token"]
    shown = {one.name: one for one in pictures(half)}
    assert len(shown["positions"].panels) == 2
    assert [about for about, _ in shown["bytes"].panels] == ["words"]


def test_every_picture_is_drawn(written: list[Path]):
    files = [one for one in written if one.suffix == ".png"]
    assert [one.stem for one in files] == ALL
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in files)
    with drawing():
        names = {one.name for one in pictures(sample("words")) if png(one.panels[0][1]()).startswith(b"\x89PNG")}
    assert names == set(ALL)
