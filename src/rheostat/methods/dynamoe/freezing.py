"""Freezing the dial: a plain checkpoint with every FFN cut to one slice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.errors import bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.dynamoe.experts import down_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def slice_computes(geometry: Geometry, sizes: tuple[int, ...]) -> list[float]:
    """What a plain model with each slice's width costs, as a fraction of the dense model; there is no router to pay."""
    saved = [2 * geometry.num_layers * geometry.channel_weights * (sizes[-1] - size) for size in sizes]
    return [1 - s / geometry.token_flops for s in saved]


def freeze(model: PreTrainedModel, compute: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """The widest uniform slice that costs at most `compute`; see `DynaMoE.freeze`."""
    ffns: list[Any] = [layer.mlp for layer in families.layers(model)]
    sizes = ffns[0].sizes
    computes = slice_computes(Geometry.from_config(model.config), sizes)
    fitting = [e for e, cost in enumerate(computes) if cost <= compute + 1e-3]
    if not fitting or not compute <= 1:
        offered = ", ".join(f"{cost:.3f} ({size} channels)" for cost, size in zip(computes, sizes, strict=True))
        raise bad_setting(
            "compute",
            compute,
            f"at least {computes[0]:.3f}: a plain checkpoint has one width for all tokens: {offered}",
        )
    expert = fitting[-1]
    if expert == len(sizes) - 1:
        return model.config, families.plain_state_dict(model)
    downs = [down_of(ffn.mlp, ffn.downs, expert, sizes[expert]) for ffn in ffns]
    return families.slice_ffns(model, sizes[expert], downs)
