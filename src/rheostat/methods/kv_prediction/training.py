"""Training of the maps: the model on predicted keys and values alone, in one parallel pass, as published.

Every position of every predicted layer attends to predicted keys and values, its own among them; queries, and all else,
are the model's. The model is frozen, but gradients flow through it to the maps. With `answer_share`, our choice, the
end of each window is read as answers are in use: on predicted keys and values of what came before, and its own.

Shapes: B rows, T tokens, V vocabulary, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.losses import language_loss
from rheostat.methods.kv_prediction.auxiliary import CacheMaps
from rheostat.methods.kv_prediction.predictor import Predictor, predictors
from rheostat.methods.kv_prediction.prefix import keeping
from rheostat.methods.kv_prediction.watching import recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rheostat.methods.kv_prediction.method import KVPrediction


@contextmanager
def predicting(
    model: PreTrainedModel,
    predictor: Predictor | CacheMaps,
    is_first: torch.Tensor,
    given: Mapping[tuple[str, int], torch.Tensor] | None = None,
    is_answer: torch.Tensor | None = None,
) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """Inside the block, passes without a cache attend to predicted keys and values from the depth on.

    Args:
        is_first: [B, T] bool, True for the first token of a text.
        given: what an auxiliary of its own has made of the same text; the model's own first layers need none.
        is_answer: [B, T] bool, positions that keep their own keys and values; None is nowhere.

    Yields:
        Of the newest pass, each [B, T, K * d], predicted, raw and in the graph: ("keys", layer) and ("values", layer).
    """
    made: dict[tuple[str, int], torch.Tensor] = {}

    def predict(module: Any, args: Any, features: torch.Tensor) -> None:
        mixed = given if isinstance(predictor, CacheMaps) else predictor.mix(kept, is_first)
        for index in range(len(predictor.sizes)):
            keys, values = predictor(mixed, is_first, index)
            made["keys", predictor.depth + index], made["values", predictor.depth + index] = keys, values

    def replace(layer: int) -> Any:
        if is_answer is None:
            return lambda kind, tensor: made[kind, layer]
        return lambda kind, tensor: torch.where(is_answer[..., None], tensor, made[kind, layer].to(tensor.dtype))

    norm = families.attention_norm(families.layers(model)[predictor.depth])
    handles: list[Any] = [norm.register_forward_hook(predict)]
    try:
        for one in families.key_values(model)[predictor.depth :]:
            handles += one.watch(replace(one.layer))
        with keeping() as kept:
            yield made
    finally:
        for handle in handles:
            handle.remove()


def loss(
    method: KVPrediction, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """See `KVPrediction.loss`. The parts logged are `lm`, `distill`, `z`, `auxiliary` and `consistency`."""
    held = list(predictors(model).values())
    predictor = held[int(torch.randint(len(held), ()))]
    keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    is_first = keep.long().cumsum(1) <= 1  # and the padding before it, which nobody sees
    with torch.no_grad(), recording(model, predictor.depth) as targets:
        dense = model(**batch, use_cache=False).logits
    told, given = None, None
    if isinstance(predictor, CacheMaps):
        hidden, given = predictor.run(batch["input_ids"], batch.get("attention_mask"), None)
        told = predictor.logits(hidden) if method.auxiliary_weight else None
    is_answer = draw_answers(keep, method.answer_share) if method.answer_share else None
    with predicting(model, predictor, is_first, given, is_answer) as made:
        logits = model(**batch, use_cache=False).logits
    teacher = dense if method.distill_weight else None
    lm, parts = language_loss(logits, batch, teacher, method.distill_weight, method.z_weight)
    distance = consistency(model, predictor, made, targets, keep)
    total = method.base_weight * lm + method.consistency_weight * distance
    if told is not None:
        auxiliary = language_loss(told, batch, None, 0.0, method.z_weight)[0]
        total, parts = total + method.auxiliary_weight * auxiliary, parts | {"auxiliary": float(auxiliary.detach())}
    return total, parts | {"consistency": float(distance.detach())}


def draw_answers(keep: torch.Tensor, share: float) -> torch.Tensor:
    """Where answers are, [B, T] bool: each row's end, its length drawn evenly from 0 to twice `share` of its tokens.

    Args:
        keep: [B, T] bool, False at padding.
    """
    lengths = keep.sum(1, keepdim=True)
    starts = lengths * (1 - 2 * share * torch.rand(len(keep), 1, device=keep.device))
    return keep & (keep.cumsum(1) > starts)


def consistency(
    model: PreTrainedModel,
    predictor: Predictor | CacheMaps,
    made: Mapping[tuple[str, int], torch.Tensor],
    targets: Mapping[Any, torch.Tensor],
    keep: torch.Tensor,
) -> torch.Tensor:
    """Mean over predicted layers of mean |keys - own keys| + mean |values - own values|.

    Keys are compared after the key norm and before rotation; positions outside `keep` [B, T] do not count.
    """
    total = torch.zeros((), device=keep.device)
    for one in families.key_values(model)[predictor.depth :]:
        keys = one.norm_keys(made["keys", one.layer]) - one.norm_keys(targets["keys", one.layer])
        values = made["values", one.layer] - targets["values", one.layer]
        total = total + keys[keep].abs().mean() + values[keep].abs().mean()
    return total / len(predictor.sizes)
