from __future__ import annotations

import pytest
import torch

from rheostat.methods.dynamoe.solve import RANKINGS, Moments, eliminate, rank, refit

N, F, D = 400, 24, 6


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated activations [N, F] and a down projection [D, F]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(F // 2, F, generator=generator)
    hidden = torch.randn(N, F // 2, generator=generator) @ mixing + 0.3 * torch.randn(N, F, generator=generator) + 1
    return hidden, torch.randn(D, F, generator=generator)


def error(hidden: torch.Tensor, down: torch.Tensor, kept: torch.Tensor) -> float:
    """Mean squared error of the best down projection on the kept channels, by the library's least squares."""
    inputs = torch.cat([hidden[:, kept], torch.ones(len(hidden), 1)], 1).double()
    target = (hidden @ down.T).double()
    solution = torch.linalg.lstsq(inputs, target).solution
    return float((inputs @ solution - target).square().mean())


def test_refit_equals_least_squares():
    hidden, down = problem()
    target = hidden @ down.T
    moments = Moments.of(hidden, target, torch.ones(N)).kept(torch.arange(10))
    weight, bias = refit(moments, ridge=0.0)
    inputs = torch.cat([hidden[:, :10], torch.ones(N, 1)], 1)
    solution = torch.linalg.lstsq(inputs.double(), target.double()).solution.float()
    torch.testing.assert_close(weight, solution[:10].T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, solution[10], rtol=1e-3, atol=1e-3)


def test_refit_without_bias_equals_least_squares_through_the_origin():
    hidden, down = problem()
    target = hidden @ down.T
    weight, bias = refit(Moments.of(hidden, target, torch.ones(N)).kept(torch.arange(10)), ridge=0.0, has_bias=False)
    assert bias is None
    solution = torch.linalg.lstsq(hidden[:, :10].double(), target.double()).solution.float()
    torch.testing.assert_close(weight, solution.T, rtol=1e-3, atol=1e-3)


def test_refit_of_all_channels_is_the_full_projection():
    hidden, down = problem()
    weight, bias = refit(Moments.of(hidden, hidden @ down.T, torch.ones(N)), ridge=0.0)
    torch.testing.assert_close(weight, down, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, torch.zeros(D), rtol=0, atol=1e-2)


def test_weights_count_tokens():
    hidden, down = problem()
    target = hidden @ down.T
    doubled = Moments.of(torch.cat([hidden, hidden[:100]]), torch.cat([target, target[:100]]), torch.ones(N + 100))
    weighted = Moments.of(hidden, target, torch.cat([torch.full((100,), 2.0), torch.ones(N - 100)]))
    torch.testing.assert_close(doubled.gram, weighted.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(doubled.cross, weighted.cross, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", RANKINGS)
def test_every_ranking_is_a_permutation(kind):
    hidden, down = problem()
    order = rank(kind, Moments.of(hidden, hidden @ down.T, torch.ones(N)), down)
    assert order.sort().values.tolist() == list(range(F))


def test_elimination_keeps_better_channels_than_size_alone():
    better = 0
    for seed in range(8):
        hidden, down = problem(seed)
        moments = Moments.of(hidden, hidden @ down.T, torch.ones(N))
        by_size = rank("activation_weight", moments, down)
        by_loss = eliminate(moments.gram, down, ridge=1e-6, block=1)
        better += error(hidden, down, by_loss[:8]) <= error(hidden, down, by_size[:8])
    assert better >= 7


def test_first_elimination_is_the_cheapest_of_all():
    hidden, down = problem()
    moments = Moments.of(hidden, hidden @ down.T, torch.ones(N))
    gone = int(eliminate(moments.gram, down, ridge=1e-9, block=1)[-1])
    costs = [error(hidden, down, torch.tensor([c for c in range(F) if c != j])) for j in range(F)]
    assert costs[gone] == pytest.approx(min(costs), rel=0.05, abs=1e-9)


def test_root_decides_which_errors_matter():
    """With only one output direction of weight, channels that do not reach it go first."""
    hidden = torch.randn(N, F, generator=torch.Generator().manual_seed(0))
    down = torch.zeros(D, F)
    down[0, : F // 2] = 1.0
    down[1, F // 2 :] = 3.0
    root = torch.zeros(D, D)
    root[0, 0] = 1.0
    order = eliminate(Moments.of(hidden, hidden @ down.T, torch.ones(N)).gram, down, root, block=1)
    assert set(order[: F // 2].tolist()) == set(range(F // 2))


def test_a_large_ridge_stays_at_the_start():
    hidden, down = problem()
    moments = Moments.of(hidden, hidden @ down.T, torch.ones(N)).kept(torch.arange(10))
    weight, _ = refit(moments, ridge=1e6, start=down[:, :10])
    torch.testing.assert_close(weight, down[:, :10], rtol=1e-3, atol=1e-3)
    free, _ = refit(moments, ridge=0.0, start=down[:, :10])
    torch.testing.assert_close(free, refit(moments, ridge=0.0)[0], rtol=1e-3, atol=1e-3)
