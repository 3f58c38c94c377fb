"""Auxiliaries that are models of their own: layer-pruned copies of the model, and smaller models; with their maps.

Base layer i is predicted from the auxiliary's layer j_i: keys from its keys, values from its values, both as they leave
the projection. As published, but for the first token, which is a constant (see `Predictor`).

Shapes: B rows, T tokens, K key/value heads, d head width, of the model or of the auxiliary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from rheostat import families
from rheostat.cost import Cost, dense_cost
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.kv_prediction.parking import Parking
from rheostat.methods.kv_prediction.watching import recording
from rheostat.spending import current_spending

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PREFIX, PRUNED = "prefix", "pruned"


def kept_layers(kept: Sequence[float], num_layers: int) -> list[int]:
    """Layers that a pruned copy keeps: a list of them as it is; a share as published (0.25: every fourth; 0.5: even
    ones; 0.75: all but every fourth), any other share spread evenly from the first layer on.

    Raises:
        SettingError: a layer that the model does not have, twice, or out of order.
    """
    if len(kept) == 1 and 0 < kept[0] < 1:
        share = kept[0]
        if share == 0.75:
            return [i for i in range(num_layers) if i % 4 != 3]
        count = max(1, round(share * num_layers))
        step = round(1 / share) if 1 / share == round(1 / share) else num_layers / count
        return [int(i * step) for i in range(count) if int(i * step) < num_layers]
    layers = [int(one) for one in kept]
    rises = all(a < b for a, b in pairwise(layers))
    if not layers or not rises or layers[0] < 0 or layers[-1] >= num_layers:
        raise bad_setting("kv_prediction.kept", tuple(kept), f"a share, or rising layers from 0 to {num_layers - 1}")
    return layers


def spread_map(num_layers: int, num_auxiliary: int) -> list[int]:
    """The general rule: consecutive layers share one of the auxiliary's; where the counts do not divide, the early ones
    share more."""
    least, more = divmod(num_layers, num_auxiliary)
    if not least:  # the auxiliary is the deeper one
        return [i * num_auxiliary // num_layers for i in range(num_layers)]
    counts = [least + (j < more) for j in range(num_auxiliary)]
    return [j for j, count in enumerate(counts) for _ in range(count)]


def kept_map(num_layers: int, kept: Sequence[int]) -> list[int]:
    """For a pruned copy: each layer is predicted from the last kept one up to it."""
    return [max(sum(layer <= i for layer in kept) - 1, 0) for i in range(num_layers)]


def check_map(layer_map: Sequence[int], num_layers: int, num_auxiliary: int) -> list[int]:
    """A user's map.

    Raises:
        SettingError: of another length than the model's depth, or with an index that the auxiliary does not have.
    """
    if len(layer_map) != num_layers:
        raise bad_setting("kv_prediction.layer_map", tuple(layer_map), f"of {num_layers} entries, one for each layer")
    if wrong := [j for j in layer_map if not 0 <= j < num_auxiliary]:
        raise bad_setting("kv_prediction.layer_map", wrong[0], f"an index from 0 to {num_auxiliary - 1}")
    return list(layer_map)


@torch.no_grad()
def pruned_copy(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of its own with these layers of `model`, their weights copied."""
    small = type(model)(families.config_of_layers(model.config, kept)).to(model.device, model.dtype).eval()
    named = families.plain_state_dict(model)
    state = {}
    for name, value in named.items():
        before, found, after = name.partition(".layers.")
        layer, _, rest = after.partition(".")
        if not found:
            state[name] = value
        elif int(layer) in kept:
            state[f"{before}.layers.{kept.index(int(layer))}.{rest}"] = value
    small.load_state_dict(state, strict=False)  # a tied head is not in the state
    small.tie_weights()
    return small


@lru_cache(maxsize=1)
def load_auxiliary(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A smaller model and its tokenizer, from wherever `rheostat.load` takes one.

    Raises:
        SettingError: it cannot be loaded, or is an adapted model.
    """
    from rheostat import models  # here, because it is built on transformers

    model, tokenizer = models.load(source)
    if not hasattr(model, "get_output_embeddings"):
        raise bad_setting("kv_prediction.auxiliary", source, "a plain model; this one is adapted")
    families.family_of(model)
    return cast("PreTrainedModel", model), tokenizer


class CacheMaps(families.Attachment):
    """An auxiliary of its own with its maps; stands where a `Predictor` stands, at depth 0."""

    depth = 0
    inputs: tuple[int, ...] = ()

    def __init__(self, auxiliary: PreTrainedModel, layer_map: Sequence[int], sizes: Sequence[int]) -> None:
        """
        Args:
            auxiliary: becomes part of this.
            layer_map: for each base layer, the auxiliary's layer that predicts it.
            sizes: K * d of each base layer.
        """
        super().__init__()
        self.auxiliary = families.decoder(auxiliary)
        head = families.head(auxiliary)
        self.head = None if head.weight is auxiliary.get_input_embeddings().weight else head
        """Of its own; None where it is the embedding's matrix."""
        self.host = [auxiliary]  # in a list, so that its parameters do not count twice
        self._parking: Parking | None = None
        self.layer_map, self.sizes = tuple(layer_map), tuple(sizes)
        own = [one.size for one in families.key_values(auxiliary)]
        self.key_maps = nn.ModuleList(nn.Linear(own[j], size) for j, size in zip(layer_map, sizes, strict=True))
        self.value_maps = nn.ModuleList(nn.Linear(own[j], size) for j, size in zip(layer_map, sizes, strict=True))
        self.firsts = nn.ParameterList(nn.Parameter(torch.zeros(2 * size)) for size in sizes)
        """Of each layer: the first token's keys, then values, raw."""

    def park(self) -> None:
        """From now on, hold the auxiliary's weights in memory only while it reads."""
        self._parking = Parking(self.auxiliary)

    def rest(self) -> None:
        """It has read for now."""
        if self._parking is not None:
            self._parking.release()

    @property
    def num_weights(self) -> int:
        """Weights of all maps."""
        return sum(cast(nn.Linear, one).weight.numel() for one in [*self.key_maps, *self.value_maps])

    def run(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> Any:
        """The auxiliary on whole texts [B, T]: its last hidden states [B, T, D], and ("keys", j) and ("values", j) of
        its layers, raw."""
        with recording(self.host[0], 0) as seen:
            out = self.auxiliary(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
        return out.last_hidden_state, seen

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The auxiliary's own logits [B, T, V]."""
        return families.logits(self.host[0], hidden)

    def read(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
    ) -> dict[tuple[str, int], torch.Tensor]:
        """What `forward` needs, of a prompt [B, T] that begins a text."""
        from rheostat.caches.hierarchical import HierarchicalCache  # here, because it is built on transformers

        if isinstance(cache, HierarchicalCache):  # no hook of ours announces its passes
            cache.mark_padding(attention_mask)
        if (spending := current_spending()) is not None:
            spending.meter.open_pass("prefill", attention_mask.bool(), 0, 0)
        return self.run(input_ids, attention_mask, position_ids)[1]

    def forward(
        self, seen: dict[tuple[str, int], torch.Tensor], is_first: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw keys and values [B, T, K * d] of base layer `index`."""
        j = self.layer_map[index]
        both = torch.cat([self.key_maps[index](seen["keys", j]), self.value_maps[index](seen["values", j])], -1)
        both = torch.where(is_first[..., None], self.firsts[index], both)
        keys, values = both.split(self.sizes[index], -1)
        return keys, values

    def auxiliary_cost(self, model: PreTrainedModel, counts: Sequence[tuple[int, int]], itemsize: int) -> Cost:
        """Its passes over rows of so many (cached, new) tokens; weights are read once."""
        geometry = Geometry.from_config(self.host[0].config)
        return own_cost(geometry, [new for _, new in counts], itemsize)


def own_cost(geometry: Geometry, lengths: Sequence[int], itemsize: int) -> Cost:
    """One pass of an auxiliary without its head over rows of these lengths."""
    cost = Cost()
    for row, length in enumerate(lengths):
        one = dense_cost(geometry, num_tokens=length, past=0, num_logits=0, itemsize=itemsize)
        if row:  # the weights are read once a pass
            one = one + weights_read(geometry, itemsize).times(-1)
        cost += one
    return cost


def weights_read(geometry: Geometry, itemsize: int) -> Cost:
    """Reading all layers' weights once."""
    return dense_cost(geometry, num_tokens=0, past=0, num_logits=0, itemsize=itemsize)


def build(model: PreTrainedModel, auxiliary: str, kept: Sequence[float], layer_map: Sequence[int]) -> CacheMaps:
    """The auxiliary that the settings name, with maps yet to be solved.

    Raises:
        SettingError: layers, map or model cannot be used.
    """
    num_layers = len(families.layers(model))
    if auxiliary == PRUNED:
        layers = kept_layers(kept, num_layers)
        small, default = pruned_copy(model, layers), kept_map(num_layers, layers)
    else:
        small = copy.deepcopy(load_auxiliary(auxiliary)[0]).to(model.device, model.dtype).eval()
        if small.config.vocab_size != model.config.vocab_size:
            raise bad_setting(
                "kv_prediction.auxiliary", auxiliary, f"of the model's vocabulary of {model.config.vocab_size} tokens"
            )
        default = spread_map(num_layers, len(families.layers(small)))
    num_auxiliary = len(families.layers(small))
    if num_auxiliary >= num_layers:
        logger.warning(
            "kv_prediction.auxiliary=%r has %d layers, the model %d: prompts will not be cheaper",
            auxiliary,
            num_auxiliary,
            num_layers,
        )
    chosen = check_map(layer_map, num_layers, num_auxiliary) if layer_map else default
    sizes = [one.size for one in families.key_values(model)]
    return CacheMaps(small, chosen, sizes).to(next(model.parameters()))


def check_tokenizer(auxiliary: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a smaller model that reads other tokens.

    Raises:
        SettingError: the tokenizers differ.
    """
    if auxiliary in (PREFIX, PRUNED):
        return
    if load_auxiliary(auxiliary)[1].get_vocab() != tokenizer.get_vocab():
        raise SettingError(
            f"kv_prediction.auxiliary={auxiliary!r}: its tokenizer is not the model's; both must read the same tokens"
        )


@torch.no_grad()
def fit(maps: CacheMaps, model: PreTrainedModel, windows: torch.Tensor, ridge: float) -> float:
    """Solve the maps on windows [W, T] by ridge regression. Returns the unexplained share of the targets' variance."""
    sums: dict[tuple[str, int], list[torch.Tensor]] = {}
    firsts = [torch.zeros_like(one, dtype=torch.float64) for one in maps.firsts]
    for batch in windows.split(max(1, 2048 // windows.shape[1])):
        batch = batch.to(model.device)
        own = maps.run(batch, None, None)[1]
        with recording(model, 0) as seen:
            families.decoder(model)(input_ids=batch, use_cache=False)
        for i, j in enumerate(maps.layer_map):
            firsts[i] += torch.cat([seen["keys", i][:, 0], seen["values", i][:, 0]], -1).sum(0)
            for kind in ("keys", "values"):
                x, y = (t[:, 1:].flatten(0, 1).double() for t in (own[kind, j], seen[kind, i]))
                x = torch.cat([x.new_ones(len(x), 1), x], 1)
                new = [x.T @ x, x.T @ y, y.square().sum(0)]
                old = sums.get((kind, i))
                sums[kind, i] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
    left = []
    for (kind, i), (gram, cross, squares) in sums.items():
        solved = (maps.key_maps if kind == "keys" else maps.value_maps)[i]
        left.append(_solve(cast(nn.Linear, solved), gram, cross, squares, ridge))
    for place, total in zip(maps.firsts, firsts, strict=True):
        place.copy_(total / len(windows))
    return float(torch.cat(left).mean())


def _solve(
    place: nn.Linear, gram: torch.Tensor, cross: torch.Tensor, squares: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Fill one map from sums over tokens, a constant first among the features. Returns what it leaves unexplained of
    each target's variance."""
    count, center, mean = gram[0, 0], gram[0, 1:] / gram[0, 0], cross[0] / gram[0, 0]
    inner = gram[1:, 1:] - count * center[:, None] * center
    outer = cross[1:] - count * center[:, None] * mean
    penalty = (ridge * inner.diagonal().mean() + 1e-12) * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    weight = torch.linalg.solve(inner + penalty, outer)
    place.weight.copy_(weight.T)
    place.bias.copy_(mean - center @ weight)
    variance = (squares / count - mean.square()).clamp(min=1e-12)
    return 1 - (2 * (weight * outer).sum(0) - (weight * (inner @ weight)).sum(0)) / count / variance
