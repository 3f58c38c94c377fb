"""Training with gradients: language-model loss through the routed model plus the routers' loss.

Shapes: B rows, T tokens, V vocabulary, N = B * T, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rheostat.methods.dynamoe.method import DynaMoE


def loss(
    method: DynaMoE,
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    teacher_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """See `DynaMoE.loss`."""
    raise NotImplementedError
