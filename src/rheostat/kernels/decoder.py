"""A whole decode step in one native call: all layers, the cache's new slots, the routers and the head."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels import structs
from rheostat.kernels.layers import describe_layer, packed
from rheostat.kernels.packed import PackedMatrix

MAX_ROWS = 256
"""Rows of one step; more are for matrix products."""


class NativeDecoder:
    """A decoder whose step runs in native code; called like its plain twin, `rheostat.runtime.plain.step`.

    Several threads may call it at once, each with a cache of its own.
    """

    def __init__(self, library: ctypes.CDLL, weights: Any) -> None:
        """Describe the weights to the native code; nothing large is copied.

        Args:
            weights: a `rheostat.runtime.weights.DecoderWeights` with packed matrices (the embedding may be plain).

        Raises:
            SettingError: something the native step cannot do.
        """
        self._library, self._weights, self._keep = library, weights, structs.Keep()
        head = packed("head", weights.head)
        self._attention = (weights.num_heads, weights.num_kv_heads, weights.head_dim)
        structs.check_attention(*self._attention, torch.float32)
        layers = [describe_layer(self._keep, layer, weights.activation) for layer in weights.layers]
        self._shape = {
            "layers": self._keep.array(structs.CLayer, layers),
            "num_layers": len(layers),
            "hidden_size": weights.hidden_size,
            "rope_half": len(weights.inv_freq),
            "eps": weights.eps,
            "final_norm": self._keep.floats(weights.final_norm),
            "head": self._keep.matrix(head),
        }

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        settings: torch.Tensor | None,
        rope: Any,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the newest token of each row: its keys and values join the cache, whose lengths grow by one.

        Args:
            token_ids: [B] int64.
            positions: [B] int64, what the tokens' queries and keys are rotated by.
            cache: a `rheostat.runtime.cache.KVCache` with B rows. It grows where it has to.
            settings: [B] float32, native settings; None, or 0 in a row, is the full FFN.
            rope: a `rheostat.runtime.rope.RopeTable` of these weights.
            out: [B, V] float32, contiguous: where the logits go.

        Returns:
            Logits [B, V] float32, and the expert [L, B] int64 that each layer took; None when all took the full FFN
            without a router being asked.

        Raises:
            SettingError: the batch does not fit the cache or the decoder.
        """
        num_rows = self._check(token_ids, positions, cache, settings)
        cache.reserve(int(cache.lengths.max()) + 1)
        table = rope.reserve(int(positions.max()) + 1)
        hidden = _embed(self._weights.embedding, token_ids)
        is_routed = settings is not None and self._weights.is_routed and bool((settings > 0).any())
        settings = settings.float().contiguous() if is_routed and settings is not None else None
        logits = torch.empty(num_rows, self._weights.vocab_size) if out is None else out
        experts = torch.empty(len(self._weights.layers), num_rows, dtype=torch.int64) if is_routed else None
        heads = structs.CAttention(
            *self._attention,
            structs.CACHE_DTYPES[cache.dtype],
            cache.num_slots,
            self._weights.attention_scale,
            0.0,
        )
        decoder = structs.CDecoder(**self._shape, attention=heads)
        held = (hidden, positions, settings, cache.lengths, cache.starts, cache.keys, cache.values)
        before, after = (
            [None if one is None else one.data_ptr() for one in group] for group in (held, (*table, logits, experts))
        )
        step = structs.CStep(*before, cache.keys.stride(0), *after, num_rows)
        self._library.rheostat_step(ctypes.byref(decoder), ctypes.byref(step), torch.get_num_threads())
        cache.advance(1)
        return logits, experts

    def _check(
        self, token_ids: torch.Tensor, positions: torch.Tensor, cache: Any, settings: torch.Tensor | None
    ) -> int:
        num_rows = len(token_ids)
        shape = (
            len(self._weights.layers),
            num_rows,
            self._weights.num_kv_heads,
            cache.num_slots,
            self._weights.head_dim,
        )
        if tuple(cache.keys.shape) != shape or not 1 <= num_rows <= MAX_ROWS:
            raise bad_setting("cache", tuple(cache.keys.shape), f"of shape {shape}, of at most {MAX_ROWS} rows")
        for one in (cache.keys, cache.values):  # rows that are kept free after each layer's are fine, nothing else
            if not one[0].is_contiguous() or one.stride(0) != cache.keys.stride(0):
                raise bad_setting("cache", one.stride(), "dense in each layer")
        if cache.dtype not in structs.CACHE_DTYPES:
            raise bad_setting("cache dtype", str(cache.dtype), ", ".join(str(one) for one in structs.CACHE_DTYPES))
        for name, one in (("positions", positions), ("token_ids", token_ids)):
            if one.shape != (num_rows,) or one.dtype != torch.int64 or not one.is_contiguous() or int(one.min()) < 0:
                raise bad_setting(name, one.tolist(), f"{num_rows} whole numbers from 0")
        if int(token_ids.max()) >= self._weights.embedding.shape[0]:
            raise bad_setting("token_ids", int(token_ids.max()), f"below {self._weights.embedding.shape[0]}")
        if settings is not None and settings.shape != (num_rows,):
            raise bad_setting("settings", tuple(settings.shape), f"one number a row: {num_rows}")
        return num_rows


def _embed(embedding: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """[B, D] float32, fresh memory."""
    if isinstance(embedding, PackedMatrix):
        return embedding.rows(token_ids)
    return embedding.detach()[token_ids].float().contiguous()
