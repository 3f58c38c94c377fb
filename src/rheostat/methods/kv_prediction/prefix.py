"""The model's own first layers as the auxiliary: run them, stop, and hand over the residual stream.

Shapes: B rows, T tokens, S cached tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rheostat import families

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_stop_at: ContextVar[int | None] = ContextVar("rheostat_kv_prediction_stop", default=None)


class Reached(Exception):
    """Thrown at the first layer that is not wanted; carries its input [B, T, D]."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def watch_for_stop(model: PreTrainedModel, depths: list[int]) -> list[Any]:
    """Set the hooks that `run_prefix` needs on the layers it may stop at. Returns their handles."""

    def hook_at(depth: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _stop_at.get() == depth:
                raise Reached(args[0] if args else kwargs["hidden_states"])

        return hook

    layers = families.layers(model)
    return [layers[depth].register_forward_pre_hook(hook_at(depth), with_kwargs=True) for depth in depths]


@contextmanager
def _stopping(depth: int) -> Iterator[None]:
    token = _stop_at.set(depth)
    try:
        yield
    finally:
        _stop_at.reset(token)


def run_prefix(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache,
    depth: int,
) -> torch.Tensor:
    """Run layers 0 .. depth - 1 on tokens [B, T]; they fill their own part of `cache`.

    Args:
        attention_mask: [B, S + T].
        position_ids: [B, T].

    Returns:
        The residual stream [B, T, D] that enters layer `depth`.
    """
    with _stopping(depth):
        try:
            families.decoder(model)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        except Reached as reached:
            return reached.hidden
    raise AssertionError(f"no hook at layer {depth}")
