from __future__ import annotations

import pytest

from rheostat.report import tables
from tests.report.sample import old_sample, sample


def test_quality_has_a_row_for_each_setting_and_a_column_for_each_baseline():
    table = tables.quality(sample()["texts"][0], "some")
    assert table.headings[4:7] == ("some, ratio to dense", "static baseline", "random baseline")
    assert all(len(row) == len(table.headings) for row in table.rows)
    assert table.rows[0] == ("1", "1.000", "100%", "20.00", "1", "", "", "40.0% ± 1.0", "100.0% ± 1.0")
    assert table.rows[2][:7] == ("0.8", "0.800", "66%", "24.00", "1.200 ± 0.010", "1.560 ± 0.010", "2.400 ± 0.010")


def test_quality_without_baselines_and_errors():
    text = old_sample()["texts"][0]
    text["runs"] = [one for one in text["runs"] if one["kind"] in ("dense", "dial")]
    text["runs"][1]["ratio"] = text["runs"][1]["perplexity"] = None
    table = tables.quality(text, "some")
    assert len(table.headings) == 7
    assert table.rows[1][3:6] == ("n/a", "n/a", "40.0%")


def test_cost():
    table = tables.cost(sample()["texts"][0])
    assert table is not None
    assert table.rows[2] == ("0.8", "216 M", "0.800", "0.820", "440 MB", "0.800")
    text = sample()["texts"][0]
    text["runs"][1]["bytes_per_token"] = None
    assert tables.cost(text).rows[1][4:] == ("n/a", "n/a")
    assert tables.cost(old_sample()["texts"][0]) is None


def test_times_with_quartiles():
    table = tables.bench(sample())
    assert table is not None
    assert table.rows[0] == ("stock", "n/a", "70", "n/a", "n/a")
    assert table.rows[3] == ("dial 0.8", "0.8", "64 [62.4, 68]", "720 [704, 792]", "15.62")
    assert tables.bench(old_sample()) is None


def test_tasks():
    table = tables.tasks(sample())
    assert table is not None
    assert table.rows[1] == ("quiz", "accuracy", "choice", "dial", "0.8", "0.400 ± 0.020", "-0.100 ± 0.010", "500")
    assert tables.tasks(old_sample()) is None


@pytest.mark.parametrize(
    ("value", "error", "wanted"),
    [(None, 0.1, ""), (-1e-9, None, "+0.000"), (0.0, 0.0, "+0.000"), (-0.02, 0.01, "-0.020 ± 0.010")],
)
def test_differences(value: float | None, error: float | None, wanted: str):
    assert tables.signed(value, error) == wanted


def test_a_dial_with_one_point_has_no_table():
    assert tables.dial({"compute": [1.0], "settings": {}}) is None
    table = tables.dial({"compute": [1.0, 0.7], "settings": {"some": [0.0, 0.04]}})
    assert table is not None
    assert table.rows == (("1.000", "0"), ("0.700", "0.04"))


def test_provenance_leaves_out_what_is_not_known():
    table = tables.provenance({"command": "x", "commit": None, "hardware": {"cores": 2}, "base_digest": "d", "odd": 1})
    assert table.rows == (("command", "x"), ("hardware", "cores 2"), ("base digest", "d"))
