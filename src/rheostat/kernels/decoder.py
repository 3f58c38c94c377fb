"""A whole decode step in one native call: all layers, the cache's new slots, the routers and the head."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels import structs
from rheostat.kernels.embedding import can_look_up, look_up
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
        self._is_routed, self._vocab_size = weights.is_routed, weights.vocab_size
        self._num_embedded = weights.embedding.shape[0]
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
        ids, places = self._check(token_ids, positions, settings, counts)
        num_rows, news = len(ids), [1] * len(ids) if counts is None else list(counts)
        lengths = cache.lengths.tolist()
        if len(lengths) != len(news):
            raise bad_setting("cache", tuple(cache.keys.shape), f"one with {len(news)} rows")
        number = 1 if drafted is None else len(drafted)
        draft = None if drafted is None else self._draft(drafted, num_rows, counts)
        cache.reserve(max(length + number * new for length, new in zip(lengths, news, strict=True)))
        plan = self._plan(cache)
        table = rope.reserve(max(places) + number)
        given = None if settings is None or not self._is_routed else settings.float().contiguous()
        if given is not None and not max(given.tolist()) > 0:
            given = None
        if hidden is None:
            hidden = self._embed(token_ids, plan.room(num_rows, self._weights.hidden_size))
        logits = torch.empty(num_rows, self._vocab_size) if out is None else out
        shape = (plan.decoder.num_layers, num_rows) if draft is None else (number, plan.decoder.num_layers, num_rows)
        experts = None if given is None else torch.empty(shape, dtype=torch.int64)
        firsts = None if counts is None else torch.tensor([0, *itertools.accumulate(news)], dtype=torch.int32)
        body = structs.planes_of(cache)
        step, tokens = plan.step, plan.step.tokens
        tokens.lengths, tokens.starts = cache.lengths.data_ptr(), cache.starts.data_ptr()
        tokens.firsts = None if firsts is None else firsts.data_ptr()
        tokens.body = None if body is None else ctypes.addressof(body)
        tokens.num_cached, step.num_rows = len(news), num_rows
        step.hidden, step.positions, step.logits = hidden.data_ptr(), positions.data_ptr(), logits.data_ptr()
        step.settings = None if given is None else given.data_ptr()
        step.experts = None if experts is None else experts.data_ptr()
        step.cos = table.data_ptr()
        step.sin = step.cos + table.stride(0) * table.itemsize
        if draft is None:
            self._library.rheostat_step(ctypes.byref(plan.decoder), ctypes.byref(step), torch.get_num_threads())
        else:
            given_all = (ctypes.byref(one) for one in (plan.decoder, step, draft))
            self._library.rheostat_draft(*given_all, torch.get_num_threads())
        cache.advance(number if counts is None else number * torch.tensor(news, dtype=torch.int32))
        return logits, experts

    @property
    def can_draft(self) -> bool:
        """Whether several greedy steps can be one call: where native code can look up rows of the embedding."""
        table = self._weights.embedding
        return isinstance(table, torch.Tensor) and can_look_up(table)

    def _draft(self, drafted: torch.Tensor, num_rows: int, counts: Sequence[int] | None) -> structs.CDraft:
        table = self._weights.embedding
        if not self.can_draft or max(counts or [1]) > 1:
            raise bad_setting("drafted", counts, "one token a row at most, and an embedding that is not packed")
        if drafted.shape[1:] != (num_rows,) or drafted.dtype != torch.int64 or not drafted.is_contiguous():
            raise bad_setting("drafted", tuple(drafted.shape), f"whole numbers [n, {num_rows}]")
        kind = structs.CACHE_DTYPES[table.dtype]
        return structs.CDraft(table.data_ptr(), table.stride(0), kind, len(drafted), drafted.data_ptr())

    def _plan(self, cache: Any) -> _Plan:
        """What steps on this cache have in common, worked out when its memory is another than before."""
        plan: _Plan | None = cache.plans.get(self)
        if plan is not None and plan.keys is cache.keys and plan.values is cache.values:
            return plan
        weights, held = self._weights, cache.keys.shape
        shape = (len(weights.layers), len(cache.lengths), weights.num_kv_heads, held[3], weights.head_dim)
        if tuple(held) != shape:
            raise bad_setting("cache", tuple(held), f"of shape {shape}")
        for one in (cache.keys, cache.values):  # rows that are kept free after each layer's are fine, nothing else
            if not one[0].is_contiguous() or one.stride(0) != cache.keys.stride(0):
                raise bad_setting("cache", one.stride(), "dense in each layer")
        if cache.dtype not in structs.CACHE_DTYPES:
            raise bad_setting("cache dtype", str(cache.dtype), ", ".join(str(one) for one in structs.CACHE_DTYPES))
        number = structs.CACHE_DTYPES[cache.dtype]
        heads = structs.CAttention(*self._attention, number, held[3], weights.attention_scale, 0.0)
        decoder = structs.CDecoder(**self._shape, attention=heads)
        step = structs.CStep(
            keys=cache.keys.data_ptr(), values=cache.values.data_ptr(), layer_stride=cache.keys.stride(0)
        )
        if any(one.keys is not cache.keys for one in cache.plans.values()):
            cache.plans.clear()  # those of other decoders hold the old memory
        plan = cache.plans[self] = _Plan(cache.keys, cache.values, decoder, step)
        return plan

    def _embed(self, token_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding [N, D] float32; `hidden` may take them."""
        table = self._weights.embedding
        if isinstance(table, PackedMatrix):
            return table.rows(token_ids)
        if not can_look_up(table):
            found: torch.Tensor = table[token_ids].float().contiguous()
            return found
        return look_up(self._library, table, token_ids, hidden)

    def _check(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        settings: torch.Tensor | None,
        counts: Sequence[int] | None,
    ) -> tuple[list[int], list[int]]:
        """Token ids and positions as plain numbers: one look at each, because an operation of torch costs more than all
        that is done with them here."""
        num_rows = len(token_ids)
        if counts is not None and (sum(counts) != num_rows or min(counts, default=0) < 0):
            raise bad_setting("counts", list(counts), f"numbers of tokens that add up to {num_rows}")
        if not 1 <= num_rows <= MAX_ROWS:
            raise bad_setting("token_ids", num_rows, f"from 1 to {MAX_ROWS} tokens")
        found = []
        for name, one in (("token_ids", token_ids), ("positions", positions)):
            fits = one.shape == (num_rows,) and one.dtype == torch.int64 and one.is_contiguous()
            found.append(one.tolist())
            if not fits or min(found[-1]) < 0:
                raise bad_setting(name, found[-1], f"{num_rows} whole numbers from 0")
        if max(found[0]) >= self._num_embedded:
            raise bad_setting("token_ids", max(found[0]), f"below {self._num_embedded}")
        if settings is not None and settings.shape != (num_rows,):
            raise bad_setting("settings", tuple(settings.shape), f"one number a row: {num_rows}")
        return found[0], found[1]


class _Plan:
    """What the steps on one cache have in common, as long as it keeps its memory."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        decoder: structs.CDecoder,
        step: structs.CStep,
    ) -> None:
        self.keys, self.values = keys, values
        self.decoder, self.step = decoder, step
        self._room = torch.empty(0, 0)

    def room(self, num_rows: int, width: int) -> torch.Tensor:
        """Memory for the residual stream [N, D]."""
        if self._room.shape != (num_rows, width):
            self._room = torch.empty(num_rows, width)
        return self._room
