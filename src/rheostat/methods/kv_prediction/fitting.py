"""The maps in closed form: ridge regression of the model's own keys and values on the residual stream.

One pass over the calibration windows gathers, for every depth, the Gram matrix of the features and their products with
the targets of all later layers; both are sums, so text of any length takes the same memory.

Shapes: W windows, T tokens, X features (a constant one added), K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rheostat import families
from rheostat.methods.base import Progress
from rheostat.methods.kv_prediction.auxiliary import CacheMaps
from rheostat.methods.kv_prediction.auxiliary import fit as solve_auxiliary
from rheostat.methods.kv_prediction.predictor import Predictor, predictors
from rheostat.methods.kv_prediction.prefix import keeping
from rheostat.methods.kv_prediction.watching import recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048


@torch.no_grad()
def fit(model: PreTrainedModel, windows: torch.Tensor, *, ridge: float, progress: Progress) -> dict[str, Any]:
    """Solve the maps of every attached depth on windows [W, T].

    Args:
        ridge: added to the Gram matrix's diagonal, relative to its mean.

    Returns:
        By depth, the share of the targets' variance that the maps leave unexplained on the same text.
    """
    held = predictors(model)
    if isinstance(maps := held.get(0), CacheMaps):
        progress("solving the auxiliary's maps", 0, 1)
        unexplained = {"auxiliary": solve_auxiliary(maps, model, windows, ridge)}
        progress("solving the auxiliary's maps", 1, 1)
        return {"unexplained": unexplained, "num_weights": maps.num_weights}
    sums = {
        depth: _Sums(one, (len(one.inputs) + len(one.previous)) * model.config.hidden_size)
        for depth, one in held.items()
        if isinstance(one, Predictor)
    }
    step = max(1, BATCH_TOKENS // windows.shape[1])
    with recording(model, min(held)) as seen, keeping() as kept:
        for start in range(0, len(windows), step):
            progress("watching the dense model", start, len(windows))
            families.decoder(model)(input_ids=windows[start : start + step].to(model.device), use_cache=False)
            for one in sums.values():
                one.add(kept, seen)
    progress("watching the dense model", len(windows), len(windows))
    left = {}
    for done, (depth, one) in enumerate(sums.items()):
        progress("solving the maps", done, len(sums))
        left[str(depth)] = one.solve(ridge)
    progress("solving the maps", len(sums), len(sums))
    return {"unexplained": left, "num_weights": sum(one.num_weights for one in held.values())}


class _Sums:
    """What one depth's regression needs of the text: X'X, X'Y, sums of Y and of the first tokens' Y, in float64."""

    def __init__(self, predictor: Predictor, num_inputs: int) -> None:
        self.predictor = predictor
        num_targets = 2 * sum(predictor.sizes)
        num_features = 1 + num_inputs
        device = predictor.firsts[0].device
        self.gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_features, num_targets, dtype=torch.float64, device=device)
        self.squares = torch.zeros(num_targets, dtype=torch.float64, device=device)
        self.firsts = torch.zeros(num_targets, dtype=torch.float64, device=device)
        self.num_windows = 0

    def add(self, kept: Mapping[int, torch.Tensor], seen: Mapping[tuple[str, int], torch.Tensor]) -> None:
        """One batch. First tokens, which the maps do not predict, are kept apart."""
        one = self.predictor
        layers = range(one.depth, one.depth + len(one.sizes))
        is_first = torch.zeros(kept[one.depth].shape[:2], dtype=torch.bool, device=kept[one.depth].device)
        is_first[:, 0] = True
        x = one.features(kept, is_first)[:, 1:].flatten(0, 1).float()
        x = torch.cat([x.new_ones(len(x), 1), x], 1)  # [N, X]
        targets = torch.cat([seen[kind, layer].float() for layer in layers for kind in ("keys", "values")], -1)
        y = targets[:, 1:].flatten(0, 1)  # [N, sum of 2 K d]
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.squares += y.square().sum(0)
        self.firsts += targets[:, 0].sum(0)
        self.num_windows += len(targets)

    def solve(self, ridge: float) -> float:
        """Fill the maps. Returns the unexplained share of the targets' variance, each target counted alike."""
        one = self.predictor
        count, mean = self.gram[0, 0], self.cross[0] / self.gram[0, 0]
        center = self.gram[0, 1:] / count  # [X]
        gram = self.gram[1:, 1:] - count * center[:, None] * center
        cross = self.cross[1:] - count * center[:, None] * mean
        variance = (self.squares / count - mean.square()).clamp(min=1e-12)
        penalty = ridge * gram.diagonal().mean() + 1e-12
        weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), device=gram.device, dtype=gram.dtype), cross)
        if isinstance(one.squeeze, nn.Linear):
            squeeze, weight = _reduce(weight, gram, variance.sqrt(), one.squeeze.out_features)
            one.squeeze.weight.copy_(squeeze.T)
            full = squeeze @ weight
        else:
            full = weight
        bias = mean - center @ full
        start = 0
        for linear, first in zip(one.maps, one.firsts, strict=True):
            stop = start + len(first)
            linear.weight.copy_(weight[:, start:stop].T)  # type: ignore[operator]
            linear.bias.copy_(bias[start:stop])  # type: ignore[operator]
            first.copy_(self.firsts[start:stop] / self.num_windows)
            start = stop
        error = variance * count - 2 * (full * cross).sum(0) + (full * (gram @ full)).sum(0)
        return float((error / count / variance).mean())


def _reduce(
    weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best maps of one rank: those of the free solution, projected on the directions in which its predictions vary
    most (reduced-rank regression), each target measured by its own spread.

    Args:
        weight: [X, Y] of the free solution.
        gram: [X, X], of centred features.
        scale: [Y], spread of each target.

    Returns:
        [X, R] and [R, Y], whose product is the map.
    """
    scaled = weight / scale
    # Predictions are P = root' scaled, up to a rotation; their main directions come from P P', which is [X, X]: there
    # are several times as many targets as features.
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()
    predicted = root.T @ scaled  # [X, Y]
    squares, left = torch.linalg.eigh(predicted @ predicted.T)
    directions = predicted.T @ left[:, -rank:] / squares[-rank:].clamp(min=1e-30).sqrt()  # [Y, R], eigenvalues rise
    return scaled @ directions, directions.T * scale
