from __future__ import annotations

import torch

from rheostat.methods.dynamoe.fit_router import fit_router, router_loss
from rheostat.methods.dynamoe.routing import Router

N, D = 3000, 8


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [N, D], expected damage [N, 2] that depends on one input, and chi-square draws around it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) * 3 + 5
    expected = torch.stack([(0.5 * (x[:, 0] - 5)).exp(), (0.25 * (x[:, 0] - 5)).exp() * 0.1], 1)
    return x, expected, expected * torch.randn(N, 2, generator=generator).square()


def test_gamma_deviance_is_least_at_the_conditional_mean():
    _, expected, draws = data()
    right = router_loss(expected.log(), draws, "damage", 0.1)
    assert right < router_loss(expected.log() + 0.3, draws, "damage", 0.1)
    assert right < router_loss(expected.log() - 0.3, draws, "damage", 0.1)


def test_a_score_far_too_low_has_a_finite_gradient():
    for score in (-12.0, -95.0, -1e4):
        scores = torch.full((4, 2), score, requires_grad=True)
        router_loss(scores, torch.ones(4, 2), "damage", 0.1).backward()
        assert bool((scores.grad < -100 / 8).all())  # upwards, and hard
        assert bool(torch.isfinite(scores.grad.norm()))


def test_router_learns_expected_damage_from_smooth_and_noisy_targets():
    x, expected, draws = data()
    fresh_x, fresh, _ = data(1)
    router = Router(D, 16, 2)
    fit_router(router, x, expected * 7, "damage", 0.1, 300, torch.Generator().manual_seed(0), draws=draws)
    with torch.no_grad():
        error = (router(fresh_x) - fresh.log()).abs().mean()
    # The smooth target is off by a factor of 7 on purpose: the draws set the scale, the smooth target the shape.
    assert error < 0.3


def test_classes_are_learned():
    x, expected, _ = data()
    router = Router(D, 16, 3)
    fit_router(router, x, expected, "class", 0.1, 300, torch.Generator().manual_seed(0))
    from rheostat.methods.dynamoe.difficulty import labels

    with torch.no_grad():
        right = (router(x).argmax(1) == labels(expected, 0.1)).float().mean()
    assert right > 0.9


def test_a_seed_fixes_the_fit():
    x, expected, draws = data()
    states = []
    for _ in range(2):
        router = Router(D, 16, 2)
        fit_router(router, x, expected, "damage", 0.1, 20, torch.Generator().manual_seed(3), draws=draws)
        states.append(router.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
