"""Training with gradients: language-model loss through the routed model plus the routers' loss.

The routed forward runs under whatever dial the trainer has set, so every slice keeps receiving gradient. The routers
learn from labels made on the routed stream itself, on one row of some of the batches, detached: their loss never
reaches the backbone.

Shapes: B rows, T tokens, V vocabulary, N = T - 1 labelled tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from rheostat import families
from rheostat.losses import language_loss
from rheostat.methods.dynamoe.difficulty import NEEDS_GRADIENT, bound, slice_damages
from rheostat.methods.dynamoe.fit_router import router_loss
from rheostat.methods.dynamoe.watching import recording
from rheostat.spending import current_spending, spend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rheostat.methods.dynamoe.method import DynaMoE


def loss(
    method: DynaMoE,
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    teacher_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """See `DynaMoE.loss`. The parts logged are `lm`, `distill` and `router`, each a mean in nats or deviance."""
    logits = model(**batch, use_cache=False).logits
    total, parts = language_loss(logits, batch, teacher_logits, method.distill_weight)
    # When the model has diverged there is nothing to label, and the trainer will say so.
    share = 1.0 if method.trained == "routers" else method.router_loss_share  # else a step might have nothing to learn
    is_lesson = method.router_loss_weight > 0 and float(torch.rand(())) < share
    if is_lesson and bool(torch.isfinite(total.detach())):
        routers = _routers_loss(method, model, batch)
        total = total + method.router_loss_weight * routers
        parts["router"] = float(routers.detach())
    return total, parts


def _row_dial(row: int, num_rows: int) -> AbstractContextManager[object]:
    """The dial of one row of the batch, where rows have dials of their own."""
    spending = current_spending()
    if spending is None or spending.native is not None:
        return nullcontext()
    return spend(spending.rows("prefill", num_rows)[row])


def _routers_loss(method: DynaMoE, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the routers' loss on one row of the batch, as routed under the current dial."""
    pick = int(torch.randint(len(batch["input_ids"]), ()))
    one = {key: value[pick : pick + 1] for key, value in batch.items()}
    mask = one.get("attention_mask")
    keep = torch.ones_like(one["input_ids"][0], dtype=torch.bool) if mask is None else mask[0].bool()
    keep = keep & (keep.long().cumsum(0) > 1)  # the first token is pinned: nothing to learn from it
    if not bool(keep.any()):
        return torch.zeros((), device=keep.device)
    needs_gradient = method.criterion in NEEDS_GRADIENT
    with _row_dial(pick, len(batch["input_ids"])), recording(model) as seen, torch.set_grad_enabled(needs_gradient):
        logits = model(**one, use_cache=False).logits[0].float()
        gradients: tuple[torch.Tensor | None, ...] = (None,) * len(seen)
        if needs_gradient:
            drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            sampled = cross_entropy(logits[keep], drawn[keep], reduction="sum")
            gradients = torch.autograd.grad(sampled, [record["y"] for record in seen])
    total = torch.zeros((), device=logits.device)
    for layer, record, gradient in zip(families.layers(model), seen, gradients, strict=True):
        ffn = layer.mlp
        x = record["x"][0, keep]
        with torch.no_grad():
            labelled = None if gradient is None else gradient[0, keep].float()
            contribute = families.contribution(model, layer)
            damage_of = bound(method.criterion, contribute, record["residual"][0, keep], gradient=labelled)
            damage = slice_damages(ffn, ffn.mlp.hidden(x), damage_of)  # type: ignore[arg-type,union-attr,operator]
        total = total + router_loss(ffn.router(x), damage, method.target, method.tolerance)  # type: ignore[union-attr,operator]
    return total / len(seen)
