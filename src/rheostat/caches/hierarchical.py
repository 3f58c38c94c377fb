"""A cache in two parts: an old body in two nibble planes, and a buffer of the newest tokens in full precision.

    [ body: a multiple of G tokens, 4 + 4 bits ] [ buffer: the newest G to 2G - 1 tokens as they are ]

Layout and rules follow QuantSpec (arXiv 2502.10424): keys in groups of G tokens of one channel, values in groups of
channels of one token, keys after rotary embedding; when the buffer holds 2G tokens its older half moves to the body;
taking tokens back shortens the buffer and never touches the body. A reader sees 8 bits (both planes) or 4 (the upper
one), and the buffer in full either way.

What a cache of n tokens holds is a function of n alone: the body has n - G - (n mod G) tokens from n = 2G on, none
before. So it does not matter whether tokens came in one pass or one by one, nor which drafts were rejected. (The
published code starts the body at n = 2G + 1.) Groups are counted from each row's own first token, padding left out: a
row of a batch is quantised as it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from rheostat.caches.counting import check_groups
from rheostat.caches.layer import HierarchicalLayer
from rheostat.errors import bad_setting
from rheostat.geometry import Geometry


class HierarchicalCache(Cache):
    """`HierarchicalLayer`s for a model; layers that attend to a window only keep it in full precision, as usual.

    An ordinary `past_key_values`: `model.generate(..., past_key_values=HierarchicalCache(model.config))`. With
    `num_planes=1` it is a plain 4-bit cache; with two, a plain 8-bit one, until somebody reads it under `reading(4)`.
    """

    def __init__(
        self,
        config: Any,
        *,
        group_size: int = 128,
        value_group_size: int = 0,
        num_planes: int = 2,
        attention_mask: torch.Tensor | None = None,
        is_remembering: bool = False,
    ) -> None:
        """An empty cache.

        Args:
            config: the model's.
            group_size: G, tokens of a key group; the buffer holds up to 2G tokens.
            value_group_size: channels of a value group; 0 is the whole head.
            num_planes: 2 to keep 8 bits, 1 to keep 4.
            attention_mask: [B, T] of the prompts, where some are padded on the left.
            is_remembering: keep the body as numbers too, until it grows: without a kernel that reads the planes
                this saves the time of unpacking them for each token, and costs the memory that they saved.

        Raises:
            SettingError: a size is out of range, or does not divide the heads.
        """
        head_dim = Geometry.from_config(config).head_dim
        check_groups(group_size, value_group_size, head_dim)
        if num_planes not in (1, 2):
            raise bad_setting("num_planes", num_planes, "1 or 2")
        super().__init__(layers=list(DynamicCache(config=config).layers))
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                ours = HierarchicalLayer(group_size, value_group_size or head_dim, num_planes=num_planes)
                ours.is_remembering = is_remembering
                self.layers[i] = ours
        if attention_mask is not None:
            self.mark_padding(attention_mask)

    @property
    def hierarchical_layers(self) -> list[HierarchicalLayer]:
        """Those without a window."""
        return [layer for layer in self.layers if isinstance(layer, HierarchicalLayer)]

    @property
    def num_bytes(self) -> int:
        """Of all layers."""
        return cache_bytes(self)

    @property
    def saved_bytes(self) -> int:
        """Bytes of a full-precision cache that reading this one leaves out, all layers and rows."""
        return sum(layer.saved_bytes for layer in self.hierarchical_layers)

    def mark_padding(self, attention_mask: torch.Tensor) -> None:
        """Say where each row's own tokens begin, before the first of them come: mask [B, T], 0 for padding."""
        padding = (attention_mask.long().cumsum(1) == 0).sum(1).tolist()
        for layer in self.hierarchical_layers:
            if not layer.is_initialized:
                layer.padding = padding

    @contextmanager
    def reading(self, bits: int) -> Iterator[None]:
        """Inside, the body reads as 4-bit or as 8-bit numbers.

        Raises:
            SettingError: for other bits, or for 8 where only 4 are kept.
        """
        layers = self.hierarchical_layers
        most = min((4 * layer.num_planes for layer in layers), default=8)
        if bits not in (4, 8) or bits > most:
            raise bad_setting("bits", bits, "4 or 8" if most == 8 else "4: this cache keeps one plane")
        before = [layer.bits for layer in layers]
        for layer in layers:
            layer.bits = bits
        try:
            yield
        finally:
            for layer, old in zip(layers, before, strict=True):
                layer.bits = old


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache stores, ours or one of `transformers`."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, HierarchicalLayer):
            total += layer.num_bytes
        elif isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
