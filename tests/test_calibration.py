"""The dial that is measured: what it promises on the text it was measured on."""

from __future__ import annotations

import itertools

import pytest
import torch

from rheostat import calibration
from rheostat.adapted import Adapted
from rheostat.calibration import calibrate, measure_compute
from rheostat.dial import Dial
from rheostat.methods import Chain, DynaMoE, KVPrediction, Method
from rheostat.spending import current_spending, spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows


def test_the_plain_model_has_nothing_to_measure():
    assert calibrate(Adapted(tiny_model(), Method()), tiny_windows()) == Dial()


@pytest.mark.parametrize("target", ["damage", "class"])
def test_the_table_covers_the_reach_without_wide_gaps(target):
    adapted = tiny_adapted(target=target)
    dial = adapted.dial
    floor = adapted.method.floor(adapted.geometry)
    assert dial.compute[0] == 1.0
    assert dial.settings["dynamoe"][0] == 0.0
    settings = dial.settings["dynamoe"]
    assert all(a < b for a, b in itertools.pairwise(settings))
    # The first token of each window is pinned to the full FFN, so the floor itself is out of reach.
    assert floor <= dial.low < floor + 0.03
    # Settings that cannot be told apart may leave a gap: two sizes of slice tie for many tokens.
    gaps = [
        high - low
        for (high, a), (low, b) in itertools.pairwise(zip(dial.compute, settings, strict=True))
        if b > a * calibration.SAME_SETTING and a > 0
    ]
    assert max(gaps) <= 0.06
    assert dial.measured_on == {"windows": 12, "tokens": 12 * 32, "length": 32}
    if target == "class":
        assert settings[-1] <= 1.0


def test_a_point_is_what_the_model_then_spends():
    adapted = tiny_adapted()
    windows = tiny_windows(seed=1)
    point = len(adapted.dial.compute) // 2
    with spend(adapted.dial.compute[point]) as meter, torch.no_grad():
        adapted(input_ids=windows)
    assert meter.compute == pytest.approx(adapted.dial.compute[point], abs=1e-9)


def test_measuring_bills_the_head_and_leaves_nothing_in_force():
    adapted = tiny_adapted()
    windows = tiny_windows(5, 20)
    assert measure_compute(adapted, windows, {"dynamoe": 0.0}) == 1.0
    spent = measure_compute(adapted, windows, {"dynamoe": 1e9})
    one_by_one = measure_compute(adapted, windows, {"dynamoe": 1e9}, batch_tokens=1)
    assert spent == pytest.approx(one_by_one)
    with spend(native={"dynamoe": 1e9}) as meter, torch.no_grad():
        adapted(input_ids=windows)
    assert spent == pytest.approx(meter.compute)
    assert current_spending() is None


def test_progress_is_told():
    adapted = tiny_adapted()
    told = []
    calibrate(adapted, tiny_windows(seed=1), progress=lambda what, done, total: told.append((what, done, total)))
    assert told
    assert all(what == "measuring the dial" and done <= total for what, done, total in told)
    assert told[-1][1] == told[-1][2]


def test_methods_together_choose_their_settings_on_few_windows(monkeypatch):
    adapted = Adapted(tiny_model(layers=4), Chain([KVPrediction(depths=(1, 2, 3)), DynaMoE(tile=4, router_steps=5)]))
    adapted.method.fit(adapted.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    read, measured = [], calibration.measure_widths

    def measuring(adapted, windows, native, batch_tokens=2048):
        read.append((len(windows), *native))
        return measured(adapted, windows, native, batch_tokens)

    monkeypatch.setattr(calibration, "measure_widths", measuring)
    dial = calibrate(adapted, tiny_windows(seed=1))
    assert set(read) == {(calibration.LEVEL_WINDOWS, "dynamoe")}  # depths are known without reading
    assert dial.measured_on["windows"] == 12


def test_the_table_says_how_wide_each_layer_was():
    adapted = tiny_adapted()
    profile = adapted.dial.profile["dynamoe"]
    assert profile[0] == (1.0, 1.0)
    _, last = calibration.measure_widths(
        adapted, tiny_windows(seed=1), {"dynamoe": adapted.dial.settings["dynamoe"][-1]}
    )
    assert profile[-1] == pytest.approx(last)
    assert sum(profile[-1]) < 1.2
