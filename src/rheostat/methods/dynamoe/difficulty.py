"""How hard a token is for a layer: the damage that each smaller expert would do to it.

Every criterion is one function of the same five tensors, so a new one is one line in `CRITERIA`. Damage is 0 for
the full FFN and larger is worse. Shapes: N tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rheostat.methods.dynamoe.experts import down_of
from rheostat.methods.dynamoe.ffn import NestedFFN

Criterion = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(small [N, D], full [N, D], residual [N, D] or its norm [N, 1], sensitivity [N, D] or None) -> damage [N],
in float32."""


def _projection(
    small: torch.Tensor, full: torch.Tensor, residual: torch.Tensor, sensitivity: torch.Tensor | None
) -> torch.Tensor:
    """1 - <small, full> / <full, full>: a similarity, reversed; sees direction and size. A slice that overshoots
    does no damage."""
    return (1 - (small * full).sum(-1) / full.square().sum(-1).clamp(min=1e-30)).clamp(min=0)


def _cosine(
    small: torch.Tensor, full: torch.Tensor, residual: torch.Tensor, sensitivity: torch.Tensor | None
) -> torch.Tensor:
    """1 - cosine: a similarity, reversed; blind to shrinkage."""
    return 1 - torch.nn.functional.cosine_similarity(small, full, dim=-1, eps=1e-15)


def _error(
    small: torch.Tensor, full: torch.Tensor, residual: torch.Tensor, sensitivity: torch.Tensor | None
) -> torch.Tensor:
    """|small - full| / |full|: the relative error, strictest of the three."""
    return (small - full).norm(dim=-1) / full.norm(dim=-1).clamp(min=1e-15)


def _residual(
    small: torch.Tensor, full: torch.Tensor, residual: torch.Tensor, sensitivity: torch.Tensor | None
) -> torch.Tensor:
    """|small - full| / |residual stream it is added to|, squared: how far the stream moves (our choice)."""
    return (small - full).square().sum(-1) / residual.square().sum(-1).clamp(min=1e-30)


def _fisher(
    small: torch.Tensor, full: torch.Tensor, residual: torch.Tensor, sensitivity: torch.Tensor | None
) -> torch.Tensor:
    """Half of <gradient, error>^2: an unbiased sample of the divergence, in nats, that the error causes (our choice).

    The gradient is that of the log-likelihood of tokens drawn from the model itself, summed over the sequence, so its
    expected outer product is the Fisher information of the layer's output, later tokens included, and half the
    quadratic
    form is the second-order Kullback-Leibler divergence from the dense model. One draw is noisy; the router averages.
    """
    assert sensitivity is not None, "the fisher criterion needs gradients"
    return 0.5 * (sensitivity * (small - full)).sum(-1).square()


CRITERIA: dict[str, Criterion] = {
    "cosine": _cosine,
    "error": _error,
    "fisher": _fisher,
    "projection": _projection,
    "residual": _residual,
}
"""The published work thresholds a similarity between nested and full output; which one was not found."""

NEEDS_GRADIENT = frozenset({"fisher"})


def fisher_root(gradient: torch.Tensor) -> torch.Tensor:
    """R [D, D] with R R^T the mean outer product of gradients [N, D]: an error e does |e R|^2 / 2 nats of
    damage on average.

    Small eigenvalues are floored, so that directions no gradient has shown are not free.
    """
    metric = (gradient.T @ gradient / len(gradient)).double()
    metric.diagonal().add_(0.01 * metric.diagonal().mean())
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.clamp(min=0).sqrt()).float()


def labels(damage: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The smallest expert whose damage is within `tolerance` (theta_label = 1 - tolerance for the similarities).

    Args:
        damage: [N, E-1].

    Returns:
        [N] int64 in 0..E-1; E-1 where no smaller expert will do.
    """
    enough = torch.nn.functional.pad(damage <= tolerance, (0, 1), value=True)
    return enough.long().argmax(1)


@torch.no_grad()
def slice_damages(
    ffn: NestedFFN,
    hidden: torch.Tensor,
    damage: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Damage [N, E-1] that each smaller slice does to tokens with hidden activations [N, F].

    Args:
        damage: (small [N, D], full [N, D]) -> [N], as a criterion with its other arguments bound.
    """
    hidden = hidden.to(ffn.mlp.down.weight.dtype)
    full = nn.functional.linear(hidden, ffn.mlp.down.weight)
    damages = []
    for expert, size in enumerate(ffn.sizes[:-1]):
        small = nn.functional.linear(hidden[:, :size], *down_of(ffn.mlp, ffn.downs, expert, size))
        damages.append(damage(small, full))
    return torch.stack(damages, 1)


def bound(
    criterion: str,
    contribute: Callable[[torch.Tensor], torch.Tensor],
    residual: torch.Tensor,
    gradient: torch.Tensor | None = None,
    root: torch.Tensor | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A criterion with all arguments but the two outputs bound.

    Args:
        contribute: from the FFN's output to what joins the stream; the residual criterion compares there.
        residual: [N], norm of the residual stream.
        gradient: [N, D], for the single-draw form of the fisher criterion.
        root: [D, D] of `fisher_root`, for its expectation over draws, the same for all tokens; used instead of
        gradients.
    """

    def damage(small: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        if criterion == "residual":
            small, full = contribute(small), contribute(full)
        if root is not None:
            return 0.5 * ((small - full).float() @ root).square().sum(-1)
        return CRITERIA[criterion](small.float(), full.float(), residual[:, None], gradient)

    return damage
