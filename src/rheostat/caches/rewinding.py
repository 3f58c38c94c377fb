"""Taking tokens back from a cache, another number in every row: what speculation needs after each round.

Rows of a batch stay aligned on the right: all end in the same column, and what a row lacks is padding on its left.
A row that takes back more tokens than the others is moved to the right by the difference.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from rheostat.errors import bad_setting

UNLIMITED = 1 << 30
"""Of a cache that sets no limit."""


class RewindableLayer(CacheLayerMixin):
    """A cache layer of ours: it takes tokens back row by row, and says what it holds."""

    is_croppable = True

    @abstractmethod
    def align(self, shifts: list[int]) -> None:
        """Move each row to the right by so many columns; the newest of them fall off its end."""

    @abstractmethod
    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, K, S, d] as a reader sees them now."""

    @abstractmethod
    def room(self) -> list[int]:
        """For each row, how many tokens after the next one would find the cache in the state it is in now."""

    @abstractmethod
    def join(self, others: list[Any]) -> None:
        """Take in the rows of `others`, layers of its own kind that hold as many columns, after its own."""


_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def check_rewindable(cache: Cache) -> None:
    """Refuse a cache that cannot take tokens back.

    Raises:
        SettingError: naming the layer that cannot. Some layers of `transformers` claim that they can and then fail
            (its quantised ones), so only those that are known to work are let through.
    """
    lazy = cache.layer_class_to_replicate
    kinds = [type(layer) for layer in cache.layers] or [lazy]
    for kind in kinds:
        is_ours = isinstance(kind, type) and issubclass(kind, RewindableLayer)
        if kind not in _PLAIN_LAYERS and not is_ours:
            allowed = "a cache that can take tokens back: a dynamic one, or one of rheostat's own"
            raise bad_setting(
                "past_key_values", f"{type(cache).__name__} of {getattr(kind, '__name__', kind)}", allowed
            )


def rewind(cache: Cache, drops: list[int]) -> None:
    """Take the newest `drops[b]` tokens back from each row b and align the rows on the right.

    The cache must have been told to record its past before the tokens came (`Cache.activate_past_recording`).
    """
    least = min(drops)
    shifts = [drop - least for drop in drops]
    if any(shifts):
        for layer in cache.layers:
            _align(layer, shifts)
    cache.crop(-least)


def join_rows(layers: list[CacheLayerMixin], order: torch.Tensor) -> CacheLayerMixin:
    """The rows of several layers that hold as many columns as one layer, the first of them.

    Args:
        order: [B], which of all the rows, one layer's after the other's, becomes row b.
    """
    first, *others = layers
    if isinstance(first, RewindableLayer):
        first.join(others)
        first.batch_select_indices(order)
    else:  # they differ in their rows alone, lengths and all else agree
        for name in ("keys", "values"):
            setattr(first, name, torch.cat([getattr(one, name) for one in layers])[order])
    return first


def room(cache: Cache, num_rows: int) -> list[int]:
    """For each row, how many tokens after the next one a pass may check and be sure that it reads what a pass of one
    token would read. A cache that quantises as it grows sets a limit."""
    limits = [layer.room() for layer in cache.layers if isinstance(layer, RewindableLayer)]
    return [min((one[row] for one in limits), default=UNLIMITED) for row in range(num_rows)]


def contents(layer: CacheLayerMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values [B, K, S, d]."""
    if isinstance(layer, RewindableLayer):
        return layer.contents()
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def roll_right(x: torch.Tensor, shifts: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """Move row b of x [B, N] to the right by shifts[b] [B]; `fill` comes in on the left."""
    source = torch.arange(x.shape[1], device=x.device) - shifts[:, None]  # [B, N]
    return x.gather(1, source.clamp(min=0)).masked_fill(source < 0, fill)


def _align(layer: CacheLayerMixin, shifts: list[int]) -> None:
    if isinstance(layer, RewindableLayer):
        layer.align(shifts)
        return
    if layer.keys is None or layer.values is None or not layer.keys.numel():
        return
    moved = torch.tensor(shifts, device=layer.keys.device)
    source = (torch.arange(layer.keys.shape[2], device=moved.device) - moved[:, None]).clamp(min=0)
    index = source[:, None, :, None]  # [B, 1, S, 1]
    layer.keys = layer.keys.gather(2, index.expand_as(layer.keys))
    layer.values = layer.values.gather(2, index.expand_as(layer.values))
