"""The routers' loss, and the fit of one router in the closed-form stage.

Shapes: N tokens, D model width, E experts.
"""

from __future__ import annotations

import torch

from rheostat.methods.dynamoe.difficulty import labels
from rheostat.methods.dynamoe.routing import Router

BATCH = 1024
LEARNING_RATE = 3e-3


def router_loss(scores: torch.Tensor, damage: torch.Tensor, target: str, tolerance: float) -> torch.Tensor:
    """How wrong the router's scores [N, outputs] are about the damage [N, E-1].

    For `damage`, the deviance of a gamma distribution: its minimum is the conditional mean even where single damages are
    noisy, which a squared error of logarithms is not. For `class`, cross-entropy with the thresholded labels.
    """
    if target == "class":
        return torch.nn.functional.cross_entropy(scores, labels(damage, tolerance))
    return (damage.clamp(min=0) * (-scores).exp() + scores).mean()


@torch.enable_grad()
def fit_router(
    router: Router,
    x: torch.Tensor,
    damage: torch.Tensor,
    target: str,
    tolerance: float,
    steps: int,
    generator: torch.Generator,
) -> float:
    """Train one router on inputs [N, D] and damages [N, E-1]. Starts from the mean damage; returns the last loss.

    Inputs are standardised while training; the scaling is folded into the first layer afterwards.
    """
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    twin = Router(x.shape[1], router.inner.out_features, router.outer.out_features).to(x.device)
    _init_inner(twin, generator)
    with torch.no_grad():
        if target == "damage":
            twin.outer.bias.copy_(damage.mean(0).clamp(min=1e-12).log())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    last = float("nan")
    for _ in range(steps):
        pick = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
        loss = router_loss(twin((x[pick] - mean) / scale), damage[pick], target, tolerance)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = float(loss.detach())
    with torch.no_grad():
        weight = twin.inner.weight / scale
        router.inner.weight.copy_(weight)
        router.inner.bias.copy_(twin.inner.bias - weight @ mean)
        router.outer.weight.copy_(twin.outer.weight)
        router.outer.bias.copy_(twin.outer.bias)
    return last


@torch.no_grad()
def _init_inner(router: Router, generator: torch.Generator) -> None:
    """Uniform in +-1/sqrt(D), drawn from our own generator so that a seed fixes the whole fit."""
    bound = router.inner.in_features**-0.5
    for tensor in (router.inner.weight, router.inner.bias):
        drawn = torch.rand(tensor.shape, generator=generator)
        tensor.copy_((drawn * 2 - 1) * bound)
