"""The load-adaptive dial: numbers in, numbers out."""

from __future__ import annotations

import pytest

from rheostat.errors import SettingError
from rheostat.serve.adaptive import EVERY, Adaptive, lowered


def test_a_queue_that_waits_lowers_the_dial_and_an_empty_one_raises_it():
    one, now = Adaptive(target=1.0), 0.0
    levels = []
    for wait in [2.0] * 6 + [0.0] * 30:
        levels.append(one.look(now, wait))
        now += EVERY
    assert levels[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert levels[6:] == sorted(levels[6:], reverse=True)
    assert levels[-1] == pytest.approx(0)


def test_between_half_and_the_whole_target_it_stays():
    one = Adaptive(target=1.0, level=0.5)
    assert one.look(10.0, 0.75) == 0.5


def test_it_looks_only_so_often():
    one = Adaptive(target=1.0)
    assert one.look(0.0, 9.0) == one.look(EVERY / 2, 9.0)


@pytest.mark.parametrize(
    ("asked", "least", "level", "expected"),
    [
        (1.0, None, 1.0, 1.0),
        (1.0, 0.6, 0.0, 1.0),
        (1.0, 0.6, 0.5, 0.8),
        (1.0, 0.6, 1.0, 0.6),
        (1.0, 0.2, 1.0, 0.5),
        (0.7, 0.9, 1.0, 0.7),
    ],
)
def test_lowered_stays_within_what_the_request_and_the_model_allow(asked, least, level, expected):
    assert lowered(asked, least, level, low=0.5) == pytest.approx(expected)


def test_the_target_is_checked():
    with pytest.raises(SettingError, match="adaptive_target=0"):
        Adaptive(target=0)
