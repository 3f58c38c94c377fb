"""The language-model loss of training: next-token cross-entropy mixed with the divergence from a dense teacher.

Logits of a large vocabulary are the largest tensor of a training step, and every pass over them costs as much as a
layer. So value and gradient are taken together, a few rows at a time, while the rows are in the processor's cache.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

ROWS = 32
"""Rows of logits at a time: with 50,000 entries in float32, 6 MB each for student and teacher."""


def language_loss(
    logits: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    teacher_logits: torch.Tensor | None,
    distill_weight: float,
    z_weight: float = 0.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """(1 - w) * cross-entropy with the text + w * KL(teacher || student) + z_weight * logsumexp(student)^2, means over
    the tokens that are not padding.

    Args:
        logits: [B, T, V] of the model in training.
        batch: `input_ids` [B, T] and, with padding, `attention_mask` [B, T].
        teacher_logits: [B, T, V], or None, which is the same as w = 0.
        distill_weight: w, from 0 to 1.
        z_weight: of the logits' squared normaliser, which has a mean over each row's last token too.

    Returns:
        The loss, and its parts for the log: `lm` (nats), with a teacher `distill` (nats), with a `z_weight` `z`.
    """
    ids = batch["input_ids"]
    keep = batch.get("attention_mask", torch.ones_like(ids)).bool()
    pairs = torch.nn.functional.pad(keep[:, :-1] & keep[:, 1:], (0, 1))  # the last position predicts nothing
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    weight = 0.0 if teacher_logits is None else distill_weight
    teacher = teacher_logits.flatten(0, 1) if teacher_logits is not None and weight else None
    flat = (logits.flatten(0, 1), teacher, targets.flatten(), pairs.flatten(), keep.flatten(), weight, z_weight)
    total, lm, distill, z = _Mixed.apply(*flat)
    parts = {"lm": float(lm)} if weight < 1 else {}
    parts |= {} if teacher is None else {"distill": float(distill)}
    return total, parts | ({"z": float(z)} if z_weight else {})


class _Mixed(torch.autograd.Function):
    """Student logits [N, V], teacher logits [N, V] or None, targets [N], which rows predict one [N], which are no
    padding [N], w, weight of z -> loss and parts."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        targets: torch.Tensor,
        pairs: torch.Tensor,
        keep: torch.Tensor,
        weight: float,
        z_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        share, z_share = (one.float() / one.sum().clamp(min=1) for one in (pairs, keep))  # [N]
        lm, distill, z = (student.new_zeros((), dtype=torch.float32) for _ in range(3))
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            raw = student[rows].float()
            scores = raw.log_softmax(-1)
            hit = targets[rows, None]
            lm -= share[rows] @ scores.gather(1, hit)[:, 0]
            if z_weight:
                top = scores.argmax(-1, keepdim=True)  # any logit less its score will do; the largest rounds best
                normaliser = (raw.gather(1, top) - scores.gather(1, top))[:, 0]
                z += z_share[rows] @ normaliser.square()
            goal = None
            if teacher is not None:
                known = teacher[rows].float().log_softmax(-1)
                goal = known.exp()
                distill += share[rows] @ (goal * known.sub_(scores)).sum(-1)
            if gradient is not None:
                slope = scores.exp_()
                rise = slope * (2 * z_weight * z_share[rows] * normaliser)[:, None] if z_weight else 0
                if goal is not None:
                    slope.sub_(goal, alpha=weight)
                slope.scatter_add_(1, hit, torch.full_like(hit, weight - 1, dtype=slope.dtype))
                gradient[rows] = slope.mul_(share[rows, None]).add_(rise)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(lm, distill, z)
        return (1 - weight) * lm + weight * distill + z_weight * z, lm, distill, z

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient * total, None, None, None, None, None, None
