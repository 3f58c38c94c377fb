from __future__ import annotations

from rheostat.report.notes import measured, notes
from rheostat.report.schema import check
from tests.report.sample import old_sample, sample


def test_how_much_text():
    assert measured(sample()["texts"][0]) == "4 windows of 256 tokens, 1,020 predicted tokens"


def test_few_windows_are_said():
    report = sample()
    assert any("With 4 windows" in line for line in notes(report))
    for text in report["texts"]:
        text["windows"] = 32
    assert not any("With" in line for line in notes(report))


def test_a_dial_that_does_not_beat_a_baseline_is_said():
    report = sample()
    assert not any("not clearly better" in line for line in notes(report))
    report["texts"][0]["runs"][2]["ratio"] = 1.06  # static at 0.9, beside 1.05 ± 0.01
    lines = [line for line in notes(report) if "not clearly better" in line]
    assert lines == ["On words at 0.9 the dial is not clearly better than the static baseline: the error bars meet."]


def test_spending_off_target_is_said():
    report = sample()
    report["texts"][1]["runs"][1]["compute"] = 0.93
    assert any("On others the compute spent differs" in line and "0.930 for 0.9" in line for line in notes(report))


def test_times_and_where_it_comes_from():
    assert any("medians" in line for line in notes(sample()))
    old = check(old_sample())
    old["provenance"]["commit"] = "abc+"
    lines = notes(old)
    assert any("No times were measured" in line for line in lines)
    assert any("before reports had a format" in line for line in lines)
    assert any("not in commit abc." in line for line in lines)
    assert not any("Bytes" in line for line in lines)
