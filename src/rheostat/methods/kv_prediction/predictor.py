"""The linear maps from an auxiliary's features to keys and values, and where they live on the model.

Shapes: B rows, T tokens, D model width, X features, R rank, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from rheostat import families

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACE = "kv_predictors"
"""Name of the attribute of the decoder that holds the maps."""


class Predictor(families.Attachment):
    """One depth's maps: what enters some layers [B, T, D] to raw keys and values of every layer from `depth` on.

    A text's first token, which later layers use as a sink and which looks like no other, is a learned constant.
    """

    def __init__(self, depth: int, inputs: Sequence[int], width: int, rank: int, sizes: Sequence[int]) -> None:
        """
        Args:
            depth: the auxiliary's number of layers.
            inputs: the layers whose normalised input is read, X = their number times D.
            width: D.
            rank: R, of all maps together; 0 for no bottleneck.
            sizes: K * d of each predicted layer, first to last.
        """
        super().__init__()
        self.depth = depth
        self.inputs = tuple(inputs)
        self.sizes = tuple(sizes)
        num_features = len(self.inputs) * width
        self.squeeze = nn.Linear(num_features, rank, bias=False) if 0 < rank < num_features else nn.Identity()
        """[R, X]."""
        num_mixed = rank if 0 < rank < num_features else num_features
        self.maps = nn.ModuleList(nn.Linear(num_mixed, 2 * size) for size in sizes)
        """Of each predicted layer: keys first, then values."""
        self.firsts = nn.ParameterList(nn.Parameter(torch.zeros(2 * size)) for size in sizes)
        """Of each predicted layer: the first token's keys, then values, raw."""

    @property
    def num_weights(self) -> int:
        """Weights that every token is multiplied with; biases and constants are not counted."""
        return sum(one.numel() for name, one in self.named_parameters() if name.endswith(".weight"))

    def features(self, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Layer -> its normalised input [B, T, D]; returns what the maps read, [B, T, X]."""
        return torch.cat([kept[layer] for layer in self.inputs], -1)

    def mix(self, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The features behind the bottleneck, [B, T, R], computed once for all layers."""
        return self.squeeze(self.features(kept))

    def forward(self, mixed: torch.Tensor, is_first: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw keys and values [B, T, K * d] of layer `depth + index`.

        Args:
            mixed: [B, T, R].
            is_first: [B, T] bool, True for the first token of a text.
        """
        both = torch.where(is_first[..., None], self.firsts[index], self.maps[index](mixed))
        keys, values = both.split(self.sizes[index], -1)
        return keys, values


def predictors(model: PreTrainedModel) -> dict[int, Predictor]:
    """The attached maps by depth."""
    held = cast(nn.ModuleList, getattr(families.decoder(model), PLACE))
    return {one.depth: one for one in cast(list[Predictor], list(held))}


def attach(model: PreTrainedModel, inputs: Mapping[int, Sequence[int]], rank: int) -> None:
    """Put maps on the model: depth -> the layers they read."""
    sizes = [one.size for one in families.key_values(model)]
    like, width = next(model.parameters()), model.config.hidden_size
    held = nn.ModuleList(Predictor(depth, read, width, rank, sizes[depth:]) for depth, read in inputs.items())
    families.decoder(model).add_module(PLACE, held.to(like))


def detach(model: PreTrainedModel) -> None:
    """Take the maps off."""
    delattr(families.decoder(model), PLACE)
