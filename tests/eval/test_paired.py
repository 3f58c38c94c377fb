from __future__ import annotations

import math
import random

import pytest

from rheostat.eval.paired import GROUPS, difference_error, jackknife, mean_error, score_error


def mean(values):
    return sum(values) / len(values)


def test_the_error_of_a_mean():
    assert mean_error([1.0, 0.0, 1.0, 1.0]) == pytest.approx(math.sqrt(0.75 / 3 / 4))
    assert mean_error([3.0]) is None
    assert mean_error([]) is None


@pytest.mark.parametrize("num_rows", [2, 7, GROUPS])
def test_the_jackknife_of_a_mean_is_its_closed_form(num_rows):
    values = [random.Random(num_rows + k).random() for k in range(num_rows)]
    assert jackknife(values, mean) == pytest.approx(mean_error(values), rel=1e-6)


def test_the_jackknife_by_groups_is_close_and_needs_few_figures():
    values = [random.Random(k).gauss(0, 1) for k in range(4 * GROUPS)]
    calls = []

    def counted(rows):
        calls.append(len(rows))
        return mean(rows)

    assert jackknife(values, counted) == pytest.approx(mean_error(values), rel=0.2)
    assert calls == [3 * GROUPS + GROUPS - 4] * GROUPS
    assert jackknife([1.0], mean) is None


def test_the_error_of_a_perplexity_follows_from_that_of_its_logarithm():
    values = [random.Random(k).gauss(-2, 0.1) for k in range(100)]

    def perplexity(rows):
        return math.exp(-mean(rows))

    by_hand = perplexity(values) * mean_error(values)  # the delta method
    assert score_error(values, perplexity, is_mean=False) == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize("is_mean", [True, False])
def test_differences_are_paired(is_mean):
    other = [random.Random(k).random() * 100 for k in range(50)]
    mine = [one + random.Random(k + 99).random() for k, one in enumerate(other)]
    gaps = [a - b for a, b in zip(mine, other, strict=True)]
    found = difference_error(mine, other, mean, is_mean=is_mean)
    assert found == pytest.approx(mean_error(gaps), rel=1e-6)
    assert found < score_error(mine, mean, is_mean=is_mean) / 10
    assert difference_error(other, other, mean, is_mean=is_mean) == 0
