"""What can be solved is solved before any gradient: the order of the channels and each expert's down projection.

Shapes: N tokens, D model width, F FFN width, h channels of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

RANKINGS = ("none", "activation", "activation_weight", "elimination")


@dataclass(frozen=True)
class Moments:
    """Weighted first and second moments of an FFN's hidden activations A [N, F]."""

    mean: torch.Tensor
    """[F]."""
    gram: torch.Tensor
    """[F, F], of the centred activations, divided by the total weight; float32, F * F * 4 bytes."""
    magnitude: torch.Tensor
    """[F], mean of |A|."""

    drift: torch.Tensor | None = None
    """[F, D], covariance of the activations with the drift that the down projection is to take back."""
    mean_drift: torch.Tensor | None = None
    """[D]."""

    @classmethod
    def of(cls, hidden: torch.Tensor, weight: torch.Tensor, drift: torch.Tensor | None = None) -> Moments:
        """Moments of `hidden` [N, F], and with `drift` [N, D], under token weights [N]."""
        share = weight / weight.sum()
        mean = share @ hidden
        centred = (hidden - mean) * share.sqrt()[:, None]
        moments = cls(mean, centred.T @ centred, share @ hidden.abs())
        if drift is None:
            return moments
        return replace(moments, drift=centred.T @ (drift * share.sqrt()[:, None]), mean_drift=share @ drift)


def rank(kind: str, moments: Moments, down: torch.Tensor, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Channels from the most to the least important.

    Args:
        kind: `none` keeps the order; `activation` sorts by mean |A_j|; `activation_weight` by mean |A_j| ||W_j||
            (both from the card); `elimination` is ours, see `eliminate`.
        moments: of the hidden activations.
        down: W, [D, F].
        metric: [D, D], how much an error in the FFN's output matters; None for the identity. Only for `elimination`.

    Returns:
        [F] int64.
    """
    if kind == "none":
        return torch.arange(down.shape[1])
    if kind == "activation":
        return moments.magnitude.argsort(descending=True, stable=True)
    if kind == "activation_weight":
        return (moments.magnitude * down.norm(dim=0)).argsort(descending=True, stable=True)
    return eliminate(moments.gram, down, metric)


def eliminate(
    gram: torch.Tensor,
    down: torch.Tensor,
    metric: torch.Tensor | None = None,
    *,
    ridge: float = 1e-3,
    block: int = 16,
) -> torch.Tensor:
    """Backward elimination: take away, again and again, the channels whose loss the others can best make up for.

    Removing channel j and re-fitting the rest costs ||w_j||^2 / [G^-1]_jj (the optimal brain surgeon's saliency for a
    whole column). After each block the inverse and the weights are updated exactly, so the order is nested and each
    prefix is chosen knowing that its down projection will be re-fitted.

    Returns:
        [F] int64, the last eliminated first.
    """
    size = gram.shape[0]
    gram = gram.double()
    inverse = torch.linalg.inv(gram + ridge * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype, device=gram.device))
    weight = down.double() if metric is None else _root(metric) @ down.double()
    alive = torch.arange(size, device=gram.device)
    gone: list[torch.Tensor] = []
    while len(alive) > block:
        loss = weight.square().sum(0) / inverse.diagonal()
        by_loss = loss.argsort(stable=True)
        out, keep = by_loss[:block], by_loss[block:].sort().values
        update = torch.linalg.solve(inverse[out][:, out], inverse[out])  # [block, alive]
        weight = (weight - weight[:, out] @ update)[:, keep]
        inverse = (inverse - inverse[:, out] @ update)[keep][:, keep]
        gone.append(alive[out])
        alive = alive[keep]
    gone.append(alive[(weight.square().sum(0) / inverse.diagonal()).argsort(stable=True)])
    return torch.cat(gone).flip(0)


def _root(metric: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance, with a floor that keeps unseen directions from being free."""
    metric = metric.double()
    eye = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    values, vectors = torch.linalg.eigh(metric + 0.01 * metric.diagonal().mean() * eye)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def refit(
    moments: Moments, down: torch.Tensor, size: int, ridge: float, *, has_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The down projection with which the first `size` channels alone come closest to the whole FFN, by ridge regression.

    With G the Gram matrix and W the full down projection, the dense output is A W^T, so its regression on the kept
    activations needs no outputs: W_e = W G[:, kept] (G[kept, kept] + r I)^-1. With a bias, G is the centred Gram matrix and the
    bias carries the mean of what was left out. Where the moments know the drift, it is added to the target.

    Args:
        size: h, channels kept.
        ridge: r, relative to the mean of the diagonal.
        has_bias: fit a bias.

    Returns:
        Weight [D, h] and bias [D] (or None), float32.
    """
    rows, mean = moments.gram[:size], moments.mean
    cross = rows @ down.T  # [h, D]
    target_mean = down @ mean
    if moments.drift is not None and moments.mean_drift is not None:
        cross = cross + moments.drift[:size]
        target_mean = target_mean + moments.mean_drift
    gram = rows[:, :size]
    if not has_bias:
        gram = gram + torch.outer(mean[:size], mean[:size])
        cross = cross + torch.outer(mean[:size], target_mean)
    gram = gram.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.cholesky_solve(cross.double(), torch.linalg.cholesky(gram)).float()  # [h, D]
    bias = target_mean - mean[:size] @ weight if has_bias else None
    return weight.T.contiguous(), bias
