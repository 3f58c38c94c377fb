"""Standard errors of scores, and of differences between two runs on the same rows.

A difference is paired: rows that are hard are hard for both runs, so its error is smaller than that of either score.
A mean has its error in closed form; any other function of the rows, such as a perplexity, gets it by the jackknife:
how much does the figure move when a part of the rows is left out? Nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Aggregate = Callable[[Sequence[Any]], float]

GROUPS = 200
"""Parts that the rows fall into for the jackknife, at most; with fewer rows, each is a part."""


def mean_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1) / len(values))


def jackknife(rows: Sequence[Any], figure: Aggregate) -> float | None:
    """The standard error of `figure(rows)`; None for fewer than two rows."""
    groups = min(len(rows), GROUPS)
    if groups < 2:
        return None
    figures = [figure([row for k, row in enumerate(rows) if k % groups != left_out]) for left_out in range(groups)]
    error = mean_error(figures)
    return None if error is None else error * (groups - 1)


def score_error(values: Sequence[Any], aggregate: Aggregate, *, is_mean: bool) -> float | None:
    """The standard error of a metric over its rows."""
    return mean_error(values) if is_mean else jackknife(values, aggregate)


def difference_error(mine: Sequence[Any], other: Sequence[Any], aggregate: Aggregate, *, is_mean: bool) -> float | None:
    """The standard error of the difference between two runs' metrics, over the same rows in the same order."""
    pairs = list(zip(mine, other, strict=True))
    if is_mean:
        return mean_error([a - b for a, b in pairs])
    return jackknife(pairs, lambda part: aggregate([a for a, _ in part]) - aggregate([b for _, b in part]))
