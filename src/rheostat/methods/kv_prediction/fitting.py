"""The maps in closed form: ridge regression of the model's own keys and values on the residual stream.

One pass over the calibration windows gathers, for every depth, the Gram matrix of the features and their products with
the targets of all later layers; both are sums, so text of any length takes the same memory.

Shapes: W windows, T tokens, X features (a constant one added), K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.methods.base import Progress
from rheostat.methods.kv_prediction.predictor import Predictor, predictors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048


@contextmanager
def recording(model: PreTrainedModel, depths: list[int]) -> Iterator[dict[Any, torch.Tensor]]:
    """Keep of the newest pass: under `depth`, the normalised residual stream that enters that layer [B, T, D]; under
    ("keys", layer) and ("values", layer), what the layer made of its own [B, T, K * d]."""
    seen: dict[Any, torch.Tensor] = {}
    layers = families.layers(model)
    handles: list[Any] = []

    def keep(place: Any) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            seen[place] = output

        return hook

    def keep_target(layer: int) -> Any:
        def see(kind: str, tensor: torch.Tensor) -> None:
            seen[kind, layer] = tensor

        return see

    try:
        handles += [families.attention_norm(layers[one]).register_forward_hook(keep(one)) for one in depths]
        for one in families.key_values(model)[min(depths) :]:
            handles += one.watch(keep_target(one.layer))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fit(model: PreTrainedModel, windows: torch.Tensor, *, ridge: float, progress: Progress) -> dict[str, Any]:
    """Solve the maps of every attached depth on windows [W, T].

    Args:
        ridge: added to the Gram matrix's diagonal, relative to its mean.

    Returns:
        By depth, the share of the targets' variance that the maps leave unexplained on the same text.
    """
    held = predictors(model)
    sums = {depth: _Sums(predictor) for depth, predictor in held.items()}
    step = max(1, BATCH_TOKENS // windows.shape[1])
    with recording(model, list(held)) as seen:
        for start in range(0, len(windows), step):
            progress("watching the dense model", start, len(windows))
            families.decoder(model)(input_ids=windows[start : start + step].to(model.device), use_cache=False)
            for one in sums.values():
                one.add(seen)
    progress("watching the dense model", len(windows), len(windows))
    left = {}
    for done, (depth, one) in enumerate(sums.items()):
        progress("solving the maps", done, len(sums))
        left[str(depth)] = one.solve(ridge)
    progress("solving the maps", len(sums), len(sums))
    return {"unexplained": left, "num_weights": sum(one.num_weights for one in held.values())}


class _Sums:
    """What one depth's regression needs of the text: X'X, X'Y and Y'Y's diagonal, in float32 per batch and float64 in
    all."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.gram: torch.Tensor | None = None
        self.cross: torch.Tensor | None = None
        self.square = 0.0
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, seen: dict[Any, torch.Tensor]) -> None:
        """One batch, first positions left out: they are handled apart."""
        depth = self.predictor.depth
        x = seen[depth][:, 1:].flatten(0, 1).float()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # [N, X]
        layers = range(depth, depth + len(self.predictor.sizes))
        y = torch.cat(
            [seen[kind, one][:, 1:].flatten(0, 1).float() for one in layers for kind in ("keys", "values")], 1
        )
        gram, cross = x.T @ x, x.T @ y
        self.gram = gram.double() if self.gram is None else self.gram + gram
        self.cross = cross.double() if self.cross is None else self.cross + cross
        self.square += float(y.double().square().sum())
        total = y.sum(0).double()
        self.total = total if self.total is None else self.total + total
        self.count += len(x)

    def solve(self, ridge: float) -> float:
        """Fill the maps. Returns the unexplained share of the variance."""
        assert self.gram is not None
        assert self.cross is not None
        assert self.total is not None
        size = len(self.gram) - 1
        penalty = torch.zeros_like(self.gram)
        penalty.diagonal()[:size] = ridge * self.gram.diagonal()[:size].mean() + 1e-12  # the constant is not penalised
        solution = torch.linalg.solve(self.gram + penalty, self.cross)  # [X, sum of 2 K d]
        error = (
            self.square - 2 * float((solution * self.cross).sum()) + float((solution * (self.gram @ solution)).sum())
        )
        variance = self.square - float(self.total.square().sum()) / self.count
        start = 0
        for linear in self.predictor.maps:
            stop = start + linear.out_features  # type: ignore[operator]
            linear.weight.copy_(solution[:-1, start:stop].T)  # type: ignore[operator,union-attr]
            linear.bias.copy_(solution[-1, start:stop])  # type: ignore[operator,union-attr]
            start = stop
        return error / variance if variance else 0.0
