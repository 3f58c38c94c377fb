"""The linear maps from an auxiliary's features to keys and values, and where they live on the model.

Shapes: B rows, T tokens, D model width, X features, R rank, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from rheostat import families
from rheostat.cost import Cost, rows_cost
from rheostat.geometry import Geometry
from rheostat.methods.base import MeteredFFN
from rheostat.methods.kv_prediction.auxiliary import CacheMaps
from rheostat.methods.kv_prediction.prefix import run_prefix
from rheostat.runtime.weights import PredictedLayers

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

PLACE = "kv_predictors"
"""Name of the attribute of the decoder that holds the maps."""


class Predictor(families.Attachment):
    """One depth's maps: what enters some layers [B, T, D] to raw keys and values of every layer from `depth` on.

    A text's first token, which later layers use as a sink and which looks like no other, is a learned constant.
    """

    def __init__(
        self,
        depth: int,
        inputs: Sequence[int],
        width: int,
        rank: int,
        sizes: Sequence[int],
        previous: Sequence[int] = (),
    ) -> None:
        """
        Args:
            depth: the auxiliary's number of layers.
            inputs: the layers whose normalised input is read.
            previous: those of which the token before is read too; X = the number of both times D.
            width: D.
            rank: R, of all maps together; 0 for no bottleneck.
            sizes: K * d of each predicted layer, first to last.
        """
        super().__init__()
        self.depth = depth
        self.inputs, self.previous = tuple(inputs), tuple(previous)
        self.sizes = tuple(sizes)
        num_features = (len(self.inputs) + len(self.previous)) * width
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

    def features(self, kept: Mapping[int, torch.Tensor], is_first: torch.Tensor) -> torch.Tensor:
        """Layer -> its normalised input [B, T, D]; returns what the maps read, [B, T, X].

        Args:
            is_first: [B, T] bool, True for the first token of a text and the padding before it.
        """
        found = [kept[layer] for layer in self.inputs]
        return torch.cat(found + [_before(kept[layer], is_first) for layer in self.previous], -1)

    def mix(self, kept: Mapping[int, torch.Tensor], is_first: torch.Tensor) -> torch.Tensor:
        """The features behind the bottleneck, [B, T, R], computed once for all layers."""
        return self.squeeze(self.features(kept, is_first))

    def read(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        """Tokens [B, T] through the first layers, which fill their part of `cache`. Returns what `forward` needs."""
        kept = run_prefix(model, input_ids, attention_mask, position_ids, cache, self.depth)
        is_padding = attention_mask[:, -input_ids.shape[1] :] == 0
        return self.mix(kept, is_padding | (position_ids == 0))

    def auxiliary_cost(self, model: PreTrainedModel, counts: Sequence[tuple[int, int]], itemsize: int) -> Cost:
        """`read` for rows of so many (cached, new) tokens, less what metered FFNs bill themselves."""
        geometry = Geometry.from_config(model.config)
        num_plain = sum(not isinstance(layer.mlp, MeteredFFN) for layer in families.layers(model)[: self.depth])
        return rows_cost(geometry.first_layers(self.depth), counts, num_plain, itemsize)

    def rest(self) -> None:
        """It has read for now; there is nothing to give back."""

    def runtime_maps(self) -> PredictedLayers:
        """These maps as the runtime computes them, as views of their parameters."""
        maps = cast("list[nn.Linear]", list(self.maps))
        return PredictedLayers(
            depth=self.depth,
            reads=self.inputs,
            previous=self.previous,
            squeeze=self.squeeze.weight.detach() if isinstance(self.squeeze, nn.Linear) else None,
            maps=tuple(one.weight.detach() for one in maps),
            biases=tuple(one.bias.detach() for one in maps),
            firsts=tuple(one.detach() for one in self.firsts),
        )

    def forward(self, mixed: torch.Tensor, is_first: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw keys and values [B, T, K * d] of layer `depth + index`.

        Args:
            mixed: [B, T, R].
            is_first: [B, T] bool, True for the first token of a text.
        """
        both = torch.where(is_first[..., None], self.firsts[index], self.maps[index](mixed))
        keys, values = both.split(self.sizes[index], -1)
        return keys, values


def _before(x: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """Of each token in x [B, T, D] the token before; itself where that is a text's first, which looks like no other, or
    padding, or was read in an earlier pass."""
    is_odd = torch.nn.functional.pad(is_first[:, :-1], (1, 0), value=True)
    return torch.where(is_odd[..., None], x, torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))


def predictors(model: PreTrainedModel) -> dict[int, Predictor | CacheMaps]:
    """The attached maps by depth; those of an auxiliary of its own are at depth 0."""
    held = cast(nn.ModuleList, getattr(families.decoder(model), PLACE))
    return {one.depth: one for one in cast("list[Predictor | CacheMaps]", list(held))}


def attach(model: PreTrainedModel, held: Sequence[Predictor | CacheMaps]) -> None:
    """Put maps on the model, in its dtype and where it is."""
    families.decoder(model).add_module(PLACE, nn.ModuleList(held).to(next(model.parameters())))


def prefix_maps(
    model: PreTrainedModel, inputs: Mapping[int, tuple[Sequence[int], Sequence[int]]], rank: int
) -> list[Predictor]:
    """Maps from the model's own first layers: depth -> the layers they read, of each token and of the one before it."""
    sizes, width = [one.size for one in families.key_values(model)], model.config.hidden_size
    return [Predictor(depth, read, width, rank, sizes[depth:], previous) for depth, (read, previous) in inputs.items()]


def detach(model: PreTrainedModel) -> None:
    """Take the maps off."""
    delattr(families.decoder(model), PLACE)
