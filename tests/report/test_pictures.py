from __future__ import annotations

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


def test_all_can_be_drawn_twice_to_the_same_bytes():
    with drawing():
        for first, second in zip(pictures(sample()), pictures(sample()), strict=True):
            assert png(first.whole()) == png(second.whole())
            for _, draw in first.panels[:1]:
                assert png(draw()).startswith(b"\x89PNG")
