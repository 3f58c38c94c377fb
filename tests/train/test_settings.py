"""Bad settings are refused by name before anything runs."""

from __future__ import annotations

import pytest

from rheostat.errors import SettingError
from rheostat.train.settings import TrainSettings


def test_the_default_trains_nothing():
    assert TrainSettings().tokens == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", -1),
        ("lora_rank", -1),
        ("length", 0),
        ("batch_size", 0),
        ("accumulate", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("router_learning_rate", -1e-3),
        ("save_minutes", 0),
        ("settles", -1),
        ("settle_windows", 0),
        ("warmup_share", 1.1),
        ("warmup_share", -0.1),
        ("low", 0.0),
        ("low", 1.1),
    ],
)
def test_bad_settings_name_themselves(name, value):
    with pytest.raises(SettingError, match=rf"train.{name}={value}: must be"):
        TrainSettings(**{name: value})


def test_low_must_not_exceed_high():
    with pytest.raises(SettingError, match=r"train.low=0.9: must be above 0 and at most train.high=0.8"):
        TrainSettings(low=0.9, high=0.8)
