"""Weights in a mapped file: they stay what they are, and memory is really given back."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rheostat.artifact import save
from rheostat.errors import SettingError
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.methods.kv_prediction.parking import Parking
from rheostat.methods.kv_prediction.predictor import predictors
from rheostat.models import load
from rheostat.spending import spend
from tests.methods.kv_prediction.given import given
from tests.tiny import tiny_windows


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_given_back_and_weights_are_there_again():
    module = nn.Linear(2048, 4096).to(torch.bfloat16)
    before, inputs = copy.deepcopy(module), torch.randn(3, 2048).bfloat16()
    parking = Parking(module)
    assert parking.nbytes == 2 * (2048 * 4096 + 4096)
    held = resident()
    parking.release()
    assert held - resident() > 0.9 * parking.nbytes
    with torch.no_grad():
        assert torch.equal(module(inputs), before(inputs))
        module.weight.mul_(2)  # what is written stays, too
    parking.release()
    assert torch.equal(module.weight, 2 * before.weight)


def test_a_copy_is_in_memory():
    module = nn.Linear(4, 4)
    assert copy.deepcopy([Parking(module), module])[0] is None


def test_an_auxiliary_that_is_given_back_reads_and_is_saved_like_any_other(tmp_path, tiny_tokenizer):
    adapted, kept = (given(auxiliary="pruned", keep_auxiliary=keep) for keep in (False, True))
    ids = tiny_windows(2, 12)
    settings = {"max_new_tokens": 4, "do_sample": False, "compute": {"prefill": adapted.dial.low}}
    wanted = kept.generate(ids, **settings)
    for _ in range(2):
        assert torch.equal(adapted.generate(ids, **settings), wanted)
    save(adapted, tiny_tokenizer, tmp_path / "saved")
    again = load(tmp_path / "saved")[0]
    assert again.method == adapted.method
    assert not again.method.keep_auxiliary
    assert torch.equal(again.generate(ids, **settings), wanted)


def test_it_is_released_after_each_prompt(monkeypatch):
    adapted, calls = given(auxiliary="pruned", keep_auxiliary=False), []
    parking = predictors(adapted.model)[0]._parking
    monkeypatch.setattr(Parking, "release", lambda self: calls.append(self))
    with spend(adapted.dial.low):
        adapted.generate(tiny_windows(1, 8), max_new_tokens=3, do_sample=False)
    assert calls == [parking]


def test_settings(caplog):
    with pytest.raises(SettingError, match="keep_auxiliary"):
        KVPrediction(keep_auxiliary="no")
    with caplog.at_level(logging.WARNING, "rheostat"):
        KVPrediction(keep_auxiliary=False)
    assert "no effect" in caplog.text
    with pytest.raises(SettingError, match="CPU"):
        Parking(nn.Linear(2, 2, device="meta"))
