"""One decode step in plain PyTorch: the reference that the native step is compared with, and its stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from rheostat.kernels import PackedMatrix, few_rows
from rheostat.runtime.cache import KVCache
from rheostat.runtime.rope import RopeTable, rotate
from rheostat.runtime.weights import DecoderWeights, FFNWeights, LayerWeights, Matrix, RouterWeights


class Decode(Protocol):
    """What takes a decode step: `step` below, or a native one."""

    def __call__(
        self,
        weights: DecoderWeights,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        settings: torch.Tensor | None,
        rope: RopeTable,
        counts: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


@dataclass(frozen=True)
class _Step:
    """What all layers of one step share."""

    weights: DecoderWeights
    cache: KVCache
    cos: torch.Tensor
    """[N, 1, r / 2]."""
    sin: torch.Tensor
    settings: torch.Tensor | None
    """[N]."""
    owners: torch.Tensor
    """[N], each token's row of the cache."""
    slots: torch.Tensor
    """[N], where each token's key and value go."""


def step(
    weights: DecoderWeights,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    settings: torch.Tensor | None,
    rope: RopeTable,
    counts: Sequence[int] | None = None,
    hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take the newest token of each row, or its newest `counts` tokens: their keys and values join the cache, whose
    lengths grow by as many. Each token sees those of its row before it, and itself.

    Args:
        weights: the decoder.
        token_ids: [N] int64, by row of the cache; one a row, or `counts`.
        positions: [N] int64, what the tokens' queries and keys are rotated by.
        cache: with B rows. It grows where it has to.
        settings: [N] float32, the native setting of each token; None, or 0 for one, is the full FFN.
        rope: the table for `weights`.
        counts: [B], new tokens of each row, 0 for one that waits. None: one a row.
        hidden: [N, D] float32, what enters the first of the layers instead of the tokens' embeddings.

    Returns:
        Logits [N, V] float32, and the expert [L, N] int64 that each layer took; None when all took the full FFN
        without a router being asked.
    """
    cos, sin = rope.at(positions)
    if settings is not None and not bool((settings > 0).any()):
        settings = None
    news = torch.tensor([1] * cache.num_rows if counts is None else list(counts), dtype=torch.int32)
    owners = torch.arange(len(news)).repeat_interleave(news)
    slots = torch.cat([torch.arange(n) for n in news.tolist()]) + cache.lengths[owners]
    shared = _Step(weights, cache, cos[:, None], sin[:, None], settings, owners, slots)
    cache.reserve(int((cache.lengths + news).max()))
    h = rows_of(weights.embedding, token_ids) if hidden is None else hidden  # [N, D]
    experts = []
    for place, layer in enumerate(weights.layers):
        h = h + _attention(shared, place, layer, rms_norm(h, layer.input_norm, weights.eps))
        x = rms_norm(h, layer.post_norm, weights.eps)
        choice = choose(layer.ffn, x, settings)
        h = h + nested_ffn(layer.ffn, x, choice, weights.activation)
        experts.append(choice)
    cache.advance(news)
    logits = product(weights.head, rms_norm(h, weights.final_norm, weights.eps)).float()
    chosen = torch.stack(experts) if settings is not None and weights.is_routed else None
    return logits, chosen


def _attention(shared: _Step, place: int, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    """Attention of the newest tokens x [N, D] over the cache and themselves."""
    weights, cache = shared.weights, shared.cache
    q, k, v = (
        product(matrix, x, bias).view(len(x), 1, -1, weights.head_dim)
        for matrix, bias in ((layer.q, layer.q_bias), (layer.k, layer.k_bias), (layer.v, layer.v_bias))
    )  # [N, 1, heads, d]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, weights.eps), rms_norm(k, layer.k_norm, weights.eps)
    if layer.has_rope:
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)
    owners, slots = shared.owners, shared.slots
    cache.keys[place][owners, :, slots] = k[:, 0].to(cache.dtype)
    cache.values[place][owners, :, slots] = v[:, 0].to(cache.dtype)
    keys, values, column = cache.contents(place)
    lengths = slots + column[owners] + 1
    starts = torch.maximum(cache.starts[owners], lengths - layer.window) if layer.window else cache.starts[owners]
    out = decode_attention(q[:, 0], keys[owners], values[owners], starts, lengths, scale=weights.attention_scale)
    return product(layer.o, out.reshape(len(x), -1), layer.o_bias)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Queries [B, H, d] over slots `starts` to `lengths - 1` of keys and values [B, K, S, d]. Returns [B, H, d]."""
    longest = int(lengths.max())
    slots = torch.arange(longest)
    seen = (slots >= starts[:, None]) & (slots < lengths[:, None])  # [B, S]
    k, v = keys[:, :, :longest].to(q.dtype), values[:, :, :longest].to(q.dtype)
    out = nn.functional.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=seen[:, None, None], scale=scale, enable_gqa=True
    )
    return out[:, :, 0]


def choose(ffn: FFNWeights, x: torch.Tensor, settings: torch.Tensor | None) -> torch.Tensor:
    """The expert [N] int64 of tokens x [N, D] at native settings [N]."""
    full = len(ffn.sizes) - 1
    if settings is None or ffn.router is None:
        return torch.full((len(x),), full)
    scores = _scores(ffn.router, x)
    if ffn.router.rule == "confidence":
        enough = scores.softmax(1).cumsum(1) >= 1 - settings[:, None]
        enough[:, -1] = True  # the sum may round to just below 1
        choice = enough.long().argmax(1)
    else:
        shares = torch.tensor(ffn.sizes, dtype=torch.float32) / ffn.sizes[-1]
        total = nn.functional.pad(scores.exp(), (0, 1)) + settings[:, None] * shares  # [N, E]
        choice = full - total.flip(1).argmin(1)
    return torch.where(settings <= 0, full, choice)


def _scores(router: RouterWeights, x: torch.Tensor) -> torch.Tensor:
    inner = nn.functional.silu(nn.functional.linear(x, router.inner.to(x.dtype), router.inner_bias.to(x.dtype)))
    return nn.functional.linear(inner, router.outer.to(x.dtype), router.outer_bias.to(x.dtype)).float()


def nested_ffn(ffn: FFNWeights, x: torch.Tensor, choice: torch.Tensor, activation: str) -> torch.Tensor:
    """Tokens x [N, D] through the experts [N] that were chosen for them; -1 gives zero."""
    out = torch.zeros_like(x)
    for expert in choice.unique().tolist():
        if expert < 0:
            continue
        rows = (choice == expert).nonzero()[:, 0]
        size = ffn.sizes[expert]
        hidden = activate(product(ffn.gate, x[rows], stop=size), activation) * product(ffn.up, x[rows], stop=size)
        down, bias = ffn.down_of(expert)
        out[rows] = product(_first_inputs(down, size), hidden, bias)
    return out


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """One of `ACTIVATIONS`."""
    match name:
        case "silu":
            return nn.functional.silu(x)
        case "relu":
            return nn.functional.relu(x)
        case _:
            return nn.functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] divided by its root mean square, times `weight` [n]; in float32 inside."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


def dense(matrix: Matrix) -> torch.Tensor:
    """The matrix as a tensor [outputs, inputs]; a packed one is unpacked."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.unpack()


def rows_of(matrix: Matrix, index: torch.Tensor) -> torch.Tensor:
    """Rows [B, inputs] of a matrix, float32."""
    return (matrix[index] if isinstance(matrix, torch.Tensor) else matrix.rows(index)).float()


def product(matrix: Matrix, x: torch.Tensor, bias: torch.Tensor | None = None, stop: int | None = None) -> torch.Tensor:
    """x [N, inputs] times the transpose of the matrix's first `stop` outputs (default: all): [N, stop] in x's dtype."""
    if isinstance(matrix, PackedMatrix):
        return few_rows(x.float(), matrix, 0, stop, None if bias is None else bias.float()).to(x.dtype)
    weight = matrix[:stop].to(x.dtype)
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _first_inputs(matrix: Matrix, size: int) -> Matrix:
    return matrix if matrix.shape[1] == size else dense(matrix)[:, :size]
