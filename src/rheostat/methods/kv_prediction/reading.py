"""Reading a prompt: the auxiliary on all tokens but the last ones, the maps into the cache, the model on the rest.

Shapes: B rows, T tokens, S cached tokens, K key/value heads, d head width.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from rheostat import families
from rheostat.cost import Cost, prediction_cost, rows_cost
from rheostat.geometry import Geometry
from rheostat.methods.base import Method, positions
from rheostat.methods.kv_prediction.auxiliary import CacheMaps
from rheostat.methods.kv_prediction.predictor import Predictor, predictors
from rheostat.spending import current_spending, for_rows, in_phase, native_settings

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Cache,
    *,
    key: str,
    num_exact: int,
) -> torch.Tensor:
    """Read prompts [B, T] into `cache` at the depth the dial asks for. Returns the next token's logits [B, V].

    Args:
        attention_mask: [B, S + T].
        key: the method's name on the dial.
        num_exact: how many of the last tokens the model itself reads.
    """
    asked = native_settings(model, "prefill", len(input_ids), input_ids.device).get(key)
    settings = [0.0] * len(input_ids) if asked is None else asked.tolist()
    by_depth: dict[int | None, list[int]] = {}
    for row, setting in enumerate(settings):
        by_depth.setdefault(depth_for(model, setting), []).append(row)
    if len(by_depth) > 1:
        return _prefill_mixed(model, input_ids, attention_mask, cache, by_depth, num_exact)
    return _prefill_alike(model, input_ids, attention_mask, cache, next(iter(by_depth)), num_exact)


def depth_for(model: PreTrainedModel, setting: float) -> int | None:
    """The auxiliary's depth at a native setting (how many layers are predicted); None for the dense model."""
    if setting <= 0:
        return None
    num_layers = len(families.layers(model))
    depths = sorted(predictors(model), reverse=True)
    return next((depth for depth in depths if num_layers - depth >= setting), depths[-1])


def _prefill_alike(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Cache,
    depth: int | None,
    num_exact: int,
) -> torch.Tensor:
    """All rows at one depth."""
    with in_phase("prefill"):
        early = input_ids.shape[1] - num_exact
        past = attention_mask.shape[1] - input_ids.shape[1]
        if depth is not None and early > 0 and (depth or not past):  # an auxiliary of its own does not know the past
            read_ahead(model, input_ids[:, :early], attention_mask[:, : past + early], cache, predictors(model)[depth])
            input_ids = input_ids[:, early:]
        return Method().prefill(model, input_ids, attention_mask, cache)


def _prefill_mixed(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Cache,
    by_depth: dict[int | None, list[int]],
    num_exact: int,
) -> torch.Tensor:
    """Rows at several depths: each group on a copy of its rows' cache, and the new entries put together after."""
    from rheostat.caches.rewinding import join_rows  # here, because it is built on transformers

    logits: list[torch.Tensor] = []
    parts = []
    for depth, rows in by_depth.items():
        own = copy.deepcopy(cache)
        if cache.get_seq_length():
            own.batch_select_indices(torch.tensor(rows, device=input_ids.device))
        with for_rows(rows, len(input_ids)):
            logits.append(_prefill_alike(model, input_ids[rows], attention_mask[rows], own, depth, num_exact))
        parts.append(own)
    order = torch.tensor([row for rows in by_depth.values() for row in rows], device=input_ids.device).argsort()
    cache.layers[:] = [join_rows(list(held), order) for held in zip(*(part.layers for part in parts), strict=True)]
    return torch.cat(logits)[order]


def read_ahead(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Cache,
    predictor: Predictor | CacheMaps,
) -> None:
    """Fill `cache` with tokens [B, T]: the layers below the depth by running them, the others by prediction."""
    num_tokens = input_ids.shape[1]
    position_ids = positions(attention_mask)[:, -num_tokens:]
    spending = current_spending()
    with spending.meter.charging("auxiliary") if spending is not None else nullcontext():
        made = predictor.read(model, input_ids, attention_mask, position_ids, cache)
        for index, layer in enumerate(families.key_values(model)[predictor.depth :]):
            keys, values = predictor(made, position_ids == 0, index)
            cache.update(layer.finish_keys(keys, position_ids), layer.finish_values(values), layer.layer)
        if spending is not None:
            spending.meter.bill(_spent(model, attention_mask, num_tokens, predictor))
    predictor.rest()
    if spending is not None:
        valid = attention_mask[:, -num_tokens:].bool()
        spending.meter.spare("prefill", valid, _dense(model, attention_mask, num_tokens))


# -- the bill


def _counts(attention_mask: torch.Tensor, num_tokens: int) -> list[tuple[int, int]]:
    """Of each row, padding left out: tokens in the cache before, and tokens now."""
    pasts = attention_mask[:, :-num_tokens].sum(1).tolist()
    return list(zip(pasts, attention_mask[:, -num_tokens:].sum(1).tolist(), strict=True))


def _spent(
    model: PreTrainedModel, attention_mask: torch.Tensor, num_tokens: int, predictor: Predictor | CacheMaps
) -> Cost:
    """What `read_ahead` cost, less what metered FFNs bill themselves."""
    geometry, itemsize = Geometry.from_config(model.config), model.dtype.itemsize
    counts = _counts(attention_mask, num_tokens)
    total = sum(new for _, new in counts)
    cost = predictor.auxiliary_cost(model, counts, itemsize)
    num_layers = geometry.num_layers - predictor.depth
    return cost + prediction_cost(geometry, num_layers, predictor.num_weights, total, itemsize)


def _dense(model: PreTrainedModel, attention_mask: torch.Tensor, num_tokens: int) -> Cost:
    """What the model would have spent on the same tokens."""
    geometry = Geometry.from_config(model.config)
    return rows_cost(geometry, _counts(attention_mask, num_tokens), geometry.num_layers, model.dtype.itemsize)
