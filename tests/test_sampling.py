"""Sampling draws from the distribution it says, shown by chi-square."""

from __future__ import annotations

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.sampling import Sampling, probabilities, sample

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -8.0]])
DRAWS = 20_000
LIMIT = 25.7
"""The chi-square with five degrees of freedom is above this once in ten thousand seeds."""


def chi_square(settings: Sampling, wanted: torch.Tensor) -> float:
    """How far draws are from the wanted distribution [V]; infinite if something impossible was drawn."""
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS.expand(DRAWS, -1), settings, generator)
    counts = torch.bincount(drawn, minlength=len(wanted)).double()
    if bool(counts[wanted == 0].any()):
        return float("inf")
    expected = wanted[wanted > 0].double() * DRAWS
    return float(((counts[wanted > 0] - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature(temperature):
    wanted = (LOGITS[0] / temperature).softmax(0)
    assert chi_square(Sampling(temperature=temperature), wanted) < LIMIT


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    full = LOGITS[0].softmax(0)
    assert float(full[:2].sum()) < 0.8 < float(full[:3].sum())
    wanted = torch.where(torch.arange(6) < 3, full, 0)
    assert chi_square(Sampling(temperature=1.0, top_p=0.8), wanted / wanted.sum()) < LIMIT


def test_top_k_comes_before_top_p():
    kept = LOGITS[0, :3].softmax(0)
    assert float(kept[0]) < 0.65 < float(LOGITS[0, :2].softmax(0)[0])  # would keep one of two, keeps two of three
    wanted = torch.cat([kept[:2], torch.zeros(4)])
    settings = Sampling(temperature=1.0, top_k=3, top_p=0.65)
    assert chi_square(settings, wanted / wanted.sum()) < LIMIT


def test_the_most_likely_token_always_stays():
    assert probabilities(LOGITS, Sampling(temperature=1.0, top_p=1e-9)).tolist() == [[1, 0, 0, 0, 0, 0]]


def test_greedy_is_the_default_and_needs_no_generator():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    assert sample(logits, Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-38])
def test_a_cold_temperature_is_greedy_and_finite(temperature):
    logits = torch.tensor([[900.0, 901.0, -900.0]])
    assert probabilities(logits, Sampling(temperature=temperature)).tolist() == [[0, 1, 0]]


def test_half_precision_is_drawn_in_float32():
    assert probabilities(LOGITS.to(torch.bfloat16), Sampling(temperature=1.0)).dtype == torch.float32


def test_a_seed_fixes_the_draws():
    draws = [
        sample(LOGITS.expand(50, -1), Sampling(temperature=1.0), torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0)]
    + [("top_p", 1.1)],
)
def test_bad_settings_name_themselves(name, value):
    with pytest.raises(SettingError, match=f"{name}={value}"):
        Sampling(**{name: value})
