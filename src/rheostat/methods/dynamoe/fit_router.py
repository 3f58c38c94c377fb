"""The routers' loss, and the fit of one router in the closed-form stage.

Shapes: N tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rheostat.methods.dynamoe.difficulty import labels
from rheostat.methods.dynamoe.routing import Router

BATCH = 1024
LEARNING_RATE = 3e-3
DRAW_LEARNING_RATE = 1e-3
DRAW_SHARE = 4
"""The noisy draws are seen for a quarter as many steps."""


STEEPEST = 8.0
"""Nats between a damage and its score, 3000-fold: beyond what the noise of single draws reaches."""


def router_loss(scores: torch.Tensor, damage: torch.Tensor, target: str, tolerance: float) -> torch.Tensor:
    """How wrong the router's scores [N, outputs] are about the damage [N, E-1].

    For `damage`, the deviance of a gamma distribution: its minimum is the conditional mean even where single damages
    are noisy, which a squared error of logarithms is not. It grows no steeper above `STEEPEST`, so that one score far
    too low has a finite gradient. For `class`, cross-entropy with the thresholded labels.
    """
    if target == "class":
        return torch.nn.functional.cross_entropy(scores, labels(damage, tolerance))
    gap = damage.clamp(min=1e-30).log() - scores
    ratio = gap.clamp(max=STEEPEST).exp() * (1 + (gap - STEEPEST).clamp(min=0))  # e^gap, then its tangent
    return (ratio + scores).mean()


def fit_router(
    router: Router,
    x: torch.Tensor,
    damage: torch.Tensor,
    target: str,
    tolerance: float,
    steps: int,
    generator: torch.Generator,
    draws: torch.Tensor | None = None,
) -> float:
    """Fit one router to inputs [N, D] and damages [N, E-1].

    Damages measured by single draws are so noisy that a router soon learns the noise by heart. So where there are
    draws, the router first learns the expected damage, which every token has, and then only briefly the draws,
    which know how
    much each kind of token matters to the model.

    Args:
        damage: [N, E-1], without sampling noise.
        draws: [M, E-1], unbiased single draws for the first M tokens, or None.

    Returns:
        The last loss.
    """
    mean, scale = x.mean(0), x.std(0)
    scale = scale.clamp(min=max(1e-6, 1e-3 * float(scale.mean())))  # so that the folded weights fit any dtype
    inputs = (x - mean) / scale
    twin = Router(x.shape[1], router.inner.out_features, router.outer.out_features).to(x.device)
    _init_inner(twin, generator)
    log_damage = damage.clamp(min=1e-12).log()
    if target == "damage":
        with torch.no_grad():
            twin.outer.bias.copy_(log_damage.mean(0))

    def smooth_loss(rows: torch.Tensor) -> torch.Tensor:
        scores = twin(inputs[rows])
        if target == "class":
            return router_loss(scores, damage[rows], target, tolerance)
        return (scores - log_damage[rows]).square().mean()

    last = _descend(twin, smooth_loss, len(x), steps, LEARNING_RATE, generator)
    if target == "damage":
        known = damage if draws is None else draws
        with torch.no_grad():  # from the mean logarithm to the logarithm of the mean
            ratio = known * (-twin(inputs[: len(known)])).exp()
            twin.outer.bias.add_(ratio.mean(0).clamp(min=1e-12).log())
        if draws is not None:
            last = _descend(
                twin,
                lambda rows: router_loss(twin(inputs[rows]), draws[rows], target, tolerance),
                len(draws),
                steps // DRAW_SHARE,
                DRAW_LEARNING_RATE,
                generator,
            )
    with torch.no_grad():  # fold the standardisation into the first layer
        weight = twin.inner.weight / scale
        router.inner.weight.copy_(weight)
        router.inner.bias.copy_(twin.inner.bias - weight @ mean)
        router.outer.weight.copy_(twin.outer.weight)
        router.outer.bias.copy_(twin.outer.bias)
    return last


@torch.enable_grad()
def _descend(
    router: Router,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    num_rows: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> float:
    """`steps` of AdamW on random rows, cosine schedule. Returns the last loss."""
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    device = router.outer.weight.device
    last = float("nan")
    for _ in range(steps):
        loss = loss_of(torch.randint(num_rows, (min(BATCH, num_rows),), generator=generator).to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = float(loss.detach())
    return last


@torch.no_grad()
def _init_inner(router: Router, generator: torch.Generator) -> None:
    """Uniform in +-1/sqrt(D), drawn from our own generator so that a seed fixes the whole fit."""
    bound = router.inner.in_features**-0.5
    for tensor in (router.inner.weight, router.inner.bias):
        drawn = torch.rand(tensor.shape, generator=generator)
        tensor.copy_((drawn * 2 - 1) * bound)
