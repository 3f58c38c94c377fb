"""What can be solved is solved before any gradient: the order of the channels and each expert's down projection.

Shapes: N tokens, D model width, F FFN width, h channels of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RANKINGS = ("none", "activation", "activation_weight", "elimination")


@dataclass(frozen=True)
class Moments:
    """Weighted first and second moments of an FFN's hidden activations A [N, F] and of what its output should
    be [N, D]."""

    mean: torch.Tensor
    """[F]."""
    gram: torch.Tensor
    """[F, F], of the centred activations, divided by the total weight; float32, F * F * 4 bytes."""
    cross: torch.Tensor
    """[F, D], covariance of the activations with the target."""
    target: torch.Tensor
    """[D], mean of the target."""
    magnitude: torch.Tensor
    """[F], mean of |A|."""

    @classmethod
    def of(cls, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> Moments:
        """Moments of `hidden` [N, F] and `target` [N, D] under token weights [N]."""
        share = weight / weight.sum()
        root = share.sqrt()[:, None]
        mean, target_mean = share @ hidden, share @ target
        centred = (hidden - mean) * root
        cross = centred.T @ ((target - target_mean) * root)
        return cls(mean, centred.T @ centred, cross, target_mean, share @ hidden.abs())

    def kept(self, channels: torch.Tensor) -> Moments:
        """The moments of some channels only, in the order given."""
        gram = self.gram[channels][:, channels]
        return Moments(self.mean[channels], gram, self.cross[channels], self.target, self.magnitude[channels])


def rank(kind: str, moments: Moments, down: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    """Channels from the most to the least important.

    Args:
        kind: `none` keeps the order; `activation` sorts by mean |A_j|; `activation_weight` by mean |A_j| ||W_j||
            (both known from pruning); `elimination` is ours, see `eliminate`.
        moments: of the hidden activations.
        down: W, [D, F].
        root: R [D, D]; an error e in the FFN's output matters as |e R|^2. None for the identity. Only for
            `elimination`.

    Returns:
        [F] int64.
    """
    if kind == "none":
        return torch.arange(down.shape[1])
    if kind == "activation":
        return moments.magnitude.argsort(descending=True, stable=True)
    if kind == "activation_weight":
        return (moments.magnitude * down.norm(dim=0)).argsort(descending=True, stable=True)
    return eliminate(moments.gram, down, root)


def eliminate(
    gram: torch.Tensor,
    down: torch.Tensor,
    root: torch.Tensor | None = None,
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
    inverse = torch.linalg.inv(
        gram + ridge * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype, device=gram.device)
    )
    weight = down.double() if root is None else root.T.double() @ down.double()
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


def refit(
    moments: Moments, ridge: float, *, start: torch.Tensor | None = None, has_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The down projection with which h channels alone come closest to the target, by ridge regression around `start`.

    Where the calibration text says little, the weights stay near `start`: with the slice of the model's own down
    projection there, that is worth about twice the text (docs/log.md), and a large ridge does no harm.

    Args:
        moments: of those h channels.
        ridge: relative to the mean of the Gram matrix's diagonal.
        start: [D, h]; zero when left out.
        has_bias: fit a bias, which carries the mean of what was left out.

    Returns:
        Weight [D, h] and bias [D] (or None), float32.
    """
    gram, cross = moments.gram.double(), moments.cross.double()
    mean, target = moments.mean.double(), moments.target.double()
    if not has_bias:
        gram = gram + torch.outer(mean, mean)
        cross = cross + torch.outer(mean, target)
    first = torch.zeros_like(cross) if start is None else start.T.double()  # [h, D]
    missing = cross - gram @ first
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = first + torch.cholesky_solve(missing, torch.linalg.cholesky(gram))
    bias = (target - mean @ weight).float() if has_bias else None
    return weight.T.float().contiguous(), bias
