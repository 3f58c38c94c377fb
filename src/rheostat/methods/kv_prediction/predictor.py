"""The linear maps from an auxiliary's features to keys and values, and where they live on the model.

Shapes: B rows, T tokens, X features, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from rheostat import families

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACE = "kv_predictors"
"""Name of the attribute of the decoder that holds the maps."""


class Predictor(families.Attachment):
    """One depth's maps: features [B, T, X] to raw keys and values of every layer from `depth` on."""

    def __init__(self, depth: int, num_features: int, sizes: Sequence[int], like: torch.Tensor) -> None:
        """
        Args:
            depth: the auxiliary's number of layers.
            num_features: X.
            sizes: K * d of each predicted layer, first to last.
            like: dtype and device of the maps.
        """
        super().__init__()
        self.depth = depth
        self.sizes = tuple(sizes)
        self.maps = nn.ModuleList(
            nn.Linear(num_features, 2 * size, dtype=like.dtype, device=like.device) for size in sizes
        )
        """Of each predicted layer: keys first, then values."""

    @property
    def num_weights(self) -> int:
        """Weights of all maps, biases not counted."""
        return sum(cast(nn.Linear, one).weight.numel() for one in self.maps)

    def forward(self, features: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw keys and values [B, T, K * d] of layer `depth + index`."""
        keys, values = self.maps[index](features).split(self.sizes[index], -1)
        return keys, values


def predictors(model: PreTrainedModel) -> dict[int, Predictor]:
    """The attached maps by depth."""
    held = getattr(families.decoder(model), PLACE)
    return {one.depth: one for one in held}


def attach(model: PreTrainedModel, depths: Sequence[int]) -> None:
    """Put maps for these depths on the model."""
    sizes = [one.size for one in families.key_values(model)]
    like = next(model.parameters())
    held = nn.ModuleList(Predictor(depth, model.config.hidden_size, sizes[depth:], like) for depth in depths)
    families.decoder(model).add_module(PLACE, held)


def detach(model: PreTrainedModel) -> None:
    """Take the maps off."""
    delattr(families.decoder(model), PLACE)
