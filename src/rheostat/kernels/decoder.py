"""A whole decode step in one native call: all layers, the cache's new slots, the routers and the head."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rheostat.errors import bad_setting
from rheostat.kernels import structs
from rheostat.kernels.layers import describe_layer, packed
from rheostat.kernels.packed import PackedMatrix

MAX_ROWS = 2048
"""Tokens of one step; more are for matrix products."""


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
        counts: Sequence[int] | None = None,
        hidden: torch.Tensor | None = None,
        drafted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the newest token of each row, or its newest `counts` tokens: their keys and values join the cache, whose
        lengths grow by as many. Each token sees those of its row before it, and itself.

        Args:
            token_ids: [N] int64, by row of the cache; one a row, or `counts`.
            positions: [N] int64, what the tokens' queries and keys are rotated by.
            cache: a `rheostat.runtime.cache.KVCache` with B rows, or a `PlaneCache`. It grows where it has to.
            settings: [N] float32, native settings; None, or 0 for a token, is the full FFN.
            rope: a `rheostat.runtime.rope.RopeTable` of these weights.
            out: [N, V] float32, contiguous: where the logits go.
            counts: [B], new tokens of each row, 0 for one that waits. None: one a row.
            hidden: [N, D] float32, contiguous, what enters the first layer instead of the tokens' embeddings; used up.
            drafted: [n, N] int64, contiguous: n steps instead of one, each after the first taking the most likely
                tokens of the one before, which are written here. For one token a row at most; see `can_draft`.

        Returns:
            Logits [N, V] float32, and the expert [L, N] int64 that each layer took, [n, L, N] with `drafted`; None
            when all took the full FFN without a router being asked.

        Raises:
            SettingError: the batch does not fit the cache or the decoder.
        """
        num_rows = self._check(token_ids, positions, cache, settings, counts)
        news = torch.tensor([1] * num_rows if counts is None else list(counts), dtype=torch.int32)
        number = 1 if drafted is None else len(drafted)
        cache.reserve(int((cache.lengths + news * number).max()))
        table = rope.reserve(int(positions.max()) + number)
        hidden = _embed(self._weights.embedding, token_ids) if hidden is None else hidden
        is_routed = settings is not None and self._weights.is_routed and bool((settings > 0).any())
        settings = settings.float().contiguous() if is_routed and settings is not None else None
        logits = torch.empty(num_rows, self._weights.vocab_size) if out is None else out
        shape = (len(self._weights.layers), num_rows)
        experts = torch.empty(shape if drafted is None else (number, *shape), dtype=torch.int64) if is_routed else None
        heads = structs.CAttention(
            *self._attention,
            structs.CACHE_DTYPES[cache.dtype],
            cache.num_slots,
            self._weights.attention_scale,
            0.0,
        )
        decoder = structs.CDecoder(**self._shape, attention=heads)
        firsts = None if counts is None else nn.functional.pad(news.cumsum(0, dtype=torch.int32), (1, 0))
        body = structs.planes_of(cache)
        tokens = structs.CNewTokens(
            *(None if one is None else one.data_ptr() for one in (cache.lengths, cache.starts, firsts)),
            None if body is None else ctypes.addressof(body),
            len(news),
        )
        before, after = (
            [None if one is None else one.data_ptr() for one in group]
            for group in ((hidden, positions, settings), (*table, logits, experts))
        )
        places = (cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.stride(0))
        step = structs.CStep(*before, tokens, *places, *after, num_rows)
        if drafted is None:
            self._library.rheostat_step(ctypes.byref(decoder), ctypes.byref(step), torch.get_num_threads())
        else:
            draft = self._draft(drafted, num_rows, counts)
            self._library.rheostat_draft(
                ctypes.byref(decoder), ctypes.byref(step), ctypes.byref(draft), torch.get_num_threads()
            )
        cache.advance(news * number)
        return logits, experts

    @property
    def can_draft(self) -> bool:
        """Whether several greedy steps can be one call: where native code can look up rows of the embedding."""
        table = self._weights.embedding
        return isinstance(table, torch.Tensor) and table.dtype in structs.CACHE_DTYPES and table.stride(1) == 1

    def _draft(self, drafted: torch.Tensor, num_rows: int, counts: Sequence[int] | None) -> structs.CDraft:
        table = self._weights.embedding
        if not self.can_draft or max(counts or [1]) > 1:
            raise bad_setting("drafted", counts, "one token a row at most, and an embedding that is not packed")
        if drafted.shape[1:] != (num_rows,) or drafted.dtype != torch.int64 or not drafted.is_contiguous():
            raise bad_setting("drafted", tuple(drafted.shape), f"whole numbers [n, {num_rows}]")
        kind = structs.CACHE_DTYPES[table.dtype]
        return structs.CDraft(table.data_ptr(), table.stride(0), kind, len(drafted), drafted.data_ptr())

    def _check(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        settings: torch.Tensor | None,
        counts: Sequence[int] | None,
    ) -> int:
        num_rows = len(token_ids)
        if counts is not None and (sum(counts) != num_rows or min(counts, default=0) < 0):
            raise bad_setting("counts", list(counts), f"numbers of tokens that add up to {num_rows}")
        shape = (
            len(self._weights.layers),
            num_rows if counts is None else len(counts),
            self._weights.num_kv_heads,
            cache.num_slots,
            self._weights.head_dim,
        )
        if tuple(cache.keys.shape) != shape or not 1 <= num_rows <= MAX_ROWS:
            raise bad_setting("cache", tuple(cache.keys.shape), f"of shape {shape}, for at most {MAX_ROWS} tokens")
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
    # Not by torch, which would wake a thread for a few rows: it then spins, on a core that this step needs.
    table = embedding.detach()
    bits = {2: torch.int16, 4: torch.int32}.get(table.itemsize)
    if bits is None or table.device.type != "cpu":
        return table[token_ids].float().contiguous()
    return torch.from_numpy(table.view(bits).numpy()[token_ids.numpy()]).view(table.dtype).float()
