"""The model's own first layers as the auxiliary: run them, stop, and hand over the residual stream.

Shapes: B rows, T tokens, S cached tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rheostat import families

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_stop_at: ContextVar[int | None] = ContextVar("rheostat_kv_prediction_stop", default=None)
_kept: ContextVar[dict[int, torch.Tensor] | None] = ContextVar("rheostat_kv_prediction_kept", default=None)
"""Layer -> the normalised stream that entered it, while somebody wants to know."""


class Reached(Exception):
    """Thrown at the first layer that is not wanted; carries its input [B, T, D]."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def set_hooks(model: PreTrainedModel, depths: Iterable[int], inputs: Iterable[int]) -> list[Any]:
    """Set the hooks that `keeping` and `run_prefix` need. Returns their handles.

    They stay in place and do nothing outside of those two: threads that share a model must not see each other's.

    Args:
        depths: layers that the auxiliary may stop at.
        inputs: layers whose input the maps read.
    """

    def stop_at(depth: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _stop_at.get() == depth:
                raise Reached(args[0] if args else kwargs["hidden_states"])

        return hook

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if (kept := _kept.get()) is not None:
                kept[layer] = output

        return hook

    layers = families.layers(model)
    handles = [layers[depth].register_forward_pre_hook(stop_at(depth), with_kwargs=True) for depth in depths]
    norms = {layer: families.attention_norm(layers[layer]) for layer in {*inputs, *depths}}
    return handles + [norm.register_forward_hook(keep(layer)) for layer, norm in norms.items()]


@contextmanager
def keeping() -> Iterator[dict[int, torch.Tensor]]:
    """Inside the block, what enters the attention of the layers that maps read [B, T, D], normalised, by layer; of the
    newest pass."""
    kept: dict[int, torch.Tensor] = {}
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


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
) -> dict[int, torch.Tensor]:
    """Run layers 0 .. depth - 1 on tokens [B, T]; they fill their own part of `cache`.

    Args:
        attention_mask: [B, S + T].
        position_ids: [B, T].

    Returns:
        Layer -> the normalised residual stream [B, T, D] that enters it, of the layers that maps read and `depth`.
    """
    with _stopping(depth), keeping() as kept:
        try:
            families.decoder(model)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        except Reached as reached:
            families.attention_norm(families.layers(model)[depth])(reached.hidden)  # kept like the others
            return kept
    raise AssertionError(f"no hook at layer {depth}")
