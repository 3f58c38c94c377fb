"""The calibration table: what it accepts, and how it reads between its points."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rheostat.dial import Dial
from rheostat.errors import SettingError

TABLE = Dial(
    compute=(1.0, 0.9, 0.7, 0.5622),
    settings={"one": (0.0, 0.01, 0.1, 10.0), "two": (0.0, 0.0, 0.5, 1.0)},
    measured_on={"windows": 3},
)


def test_points_are_hit_exactly():
    for i, compute in enumerate(TABLE.compute):
        native = TABLE.native(compute)
        assert native == pytest.approx({"one": TABLE.settings["one"][i], "two": TABLE.settings["two"][i]})
    assert TABLE.native(1.0)["one"] == 0.0


def test_between_points_the_logarithm_is_interpolated():
    assert TABLE.native(0.8)["one"] == pytest.approx((0.01 * 0.1) ** 0.5)
    assert TABLE.native(0.95)["one"] == pytest.approx(0.005)  # no logarithm of 0
    assert TABLE.native(0.8)["two"] == pytest.approx(0.25)


@given(st.lists(st.floats(0.5622, 1.0), min_size=2, max_size=6))
def test_less_compute_is_never_a_milder_setting(computes):
    computes = sorted(computes, reverse=True)
    for name in TABLE.settings:
        settings = [TABLE.native(compute)[name] for compute in computes]
        assert settings == sorted(settings)


@pytest.mark.parametrize("compute", [0.0, 0.3, 0.56, 1.01, float("nan")])
def test_outside_the_range_the_error_states_it(compute):
    with pytest.raises(SettingError, match=rf"compute={compute!r}: must be between 0.563 and 1"):
        TABLE.native(compute)


def test_the_range_that_an_error_states_is_allowed():
    TABLE.native(0.563)
    low = torch.tensor([TABLE.low])  # float32 lies a little below
    assert float(low) != TABLE.low
    assert TABLE.native(float(low))["one"] == pytest.approx(10.0)
    TABLE.native(TABLE.low - 5e-7)


def test_without_calibration_only_dense_is_allowed():
    dial = Dial()
    assert dial.native(1.0) == {}
    assert dial.rows([1.0, 1.0], torch.device("cpu")) == {}
    with pytest.raises(SettingError, match=r"compute=0.5: must be 1.0: .*adapt it first"):
        dial.native(0.5)


def test_rows_have_their_own_settings():
    rows = TABLE.rows([0.7, 1.0, 0.9, 0.7], torch.device("cpu"))
    assert rows["one"].tolist() == pytest.approx([0.1, 0.0, 0.01, 0.1])


def test_a_table_survives_json():
    assert Dial.from_dict(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


@pytest.mark.parametrize(
    ("compute", "settings"),
    [
        ((), {}),
        ((0.9,), {}),
        ((1.0, 1.0), {}),
        ((1.0, 0.5, 0.6), {}),
        ((1.0, 0.0), {}),
        ((1.0, 0.5), {"one": (0.0,)}),
        ((1.0, 0.5), {"one": (0.0, -1.0)}),
        ((1.0, 0.5), {"one": (0.0, float("inf"))}),
        ((1.0, float("nan")), {}),
    ],
)
def test_a_table_that_is_none_is_refused(compute, settings):
    with pytest.raises(SettingError, match="^dial: "):
        Dial(compute=compute, settings=settings)
    with pytest.raises(SettingError, match="^dial: the saved table cannot be read"):
        Dial.from_dict({"compute": list(compute), "settings": {k: list(v) for k, v in settings.items()}})


@pytest.mark.parametrize("table", [{}, {"compute": [1.0]}, {"compute": ["x"], "settings": {}}, [], None, "x"])
def test_a_saved_table_of_another_form_is_refused(table):
    with pytest.raises(SettingError, match="^dial: the saved table cannot be read"):
        Dial.from_dict(table)


def test_a_profile_of_layers_survives_and_is_checked():
    shares = ((1.0, 1.0), (0.5, 0.75))
    one = Dial(compute=(1.0, 0.8), settings={"m": (0.0, 1.0)}, profile={"m": shares})
    assert Dial.from_dict(one.to_dict()) == one
    assert "profile" not in Dial(compute=(1.0, 0.8), settings={"m": (0.0, 1.0)}).to_dict()
    for bad in ((shares[0],), ((1.0, 1.0), (0.5,)), ((1.0, 1.0), (0.5, 1.5)), ((1.0, 1.0), (0.5, float("nan")))):
        with pytest.raises(SettingError, match="dial: the profile of m must have one row of shares for each compute"):
            replace(one, profile={"m": bad})


def test_between_equal_settings_is_exactly_that_setting():
    """A step a hair above another would count as the next one."""
    dial = Dial(compute=(1.0, 0.7, 0.5, 0.3), settings={"steps": (0.0, 15.0, 15.0, 18.0)})
    assert {dial.native(0.7 - 0.002 * i)["steps"] for i in range(100)} == {15.0}
