"""Reading a prompt: matrix products over all tokens at once, the form that the machine's matrix units like.

Padding costs nothing: the tokens of all rows are packed one after the other, [N, D], and only attention looks at rows
apart. Where a router chose, tokens are sorted by width and each block of channels runs over a shrinking prefix of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rheostat.runtime.cache import KVCache
from rheostat.runtime.plain import activate, choose, dense, rms_norm
from rheostat.runtime.rope import RopeTable, rotate
from rheostat.runtime.weights import DecoderWeights, FFNWeights, LayerWeights

QUERY_BLOCK = 1024
"""Queries that attend at once where a window needs a mask: bounds the mask's memory."""

SHORT_BLOCK = 256
"""Prompts of one to two of these attend in two parts: torch's kernel takes 512 keys at a time, and so would compute
the whole square of a prompt that short."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of a batch of prompts, packed without their padding."""

    token_ids: torch.Tensor
    """[N]."""
    positions: torch.Tensor
    """[N], from 0 in each row."""
    lengths: list[int]
    """Tokens of each row."""
    valid: torch.Tensor
    """[B, T] bool, where they stood."""

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Prompt:
        """Pack token ids [B, T]; the mask [B, T] is 0 at padding."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = valid.sum(1).tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(input_ids[valid], positions, lengths, valid)

    @property
    def firsts(self) -> torch.Tensor:
        """[B], where each row's first token is among the packed."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return ends - torch.tensor(self.lengths)

    @property
    def lasts(self) -> torch.Tensor:
        """[B], where each row's last token is."""
        return torch.tensor(self.lengths).cumsum(0) - 1


def prefill(
    weights: DecoderWeights,
    prompt: Prompt,
    cache: KVCache,
    settings: torch.Tensor | None,
    rope: RopeTable,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Read prompts into an empty cache.

    Args:
        weights: with matrices in the dtype to compute in; the residual stream is float32 all the same.
        prompt: B rows.
        cache: of B rows; each row's tokens begin at slot 0.
        settings: [B] float32, the native setting of each row; None, or 0 in a row, is the full FFN.
        rope: the table for `weights`.

    Returns:
        The last tokens' normalised hidden states [B, D], which the head turns into logits, and each layer's experts
        [N]; None where no router was asked.
    """
    if settings is not None and not bool((settings > 0).any()):
        settings = None
    longest = max(prompt.lengths)
    cache.reserve(longest)
    angles = [one[None] for one in rope.at(prompt.positions)]  # [1, N, r / 2]
    by_token = None if settings is None else settings.repeat_interleave(torch.tensor(prompt.lengths))
    h = dense(weights.embedding)[prompt.token_ids].float()  # [N, D]
    experts = []
    for place, layer in enumerate(weights.layers):
        dtype = dense(layer.o).dtype
        h += _attention(
            weights, place, layer, rms_norm(h, layer.input_norm, weights.eps).to(dtype), prompt, cache, angles
        )
        x = rms_norm(h, layer.post_norm, weights.eps)
        if by_token is None or layer.ffn.router is None:
            h += whole_ffn(layer.ffn, x.to(dtype), weights.activation)
            continue
        choice = choose(layer.ffn, x, by_token)
        choice[prompt.firsts] = len(layer.ffn.sizes) - 1  # the attention sink: its huge activations serve all
        h += grouped_ffn(layer.ffn, x.to(dtype), choice, weights.activation)
        experts.append(choice)
    cache.lengths.copy_(torch.tensor(prompt.lengths, dtype=torch.int32))
    return rms_norm(h[prompt.lasts], weights.final_norm, weights.eps), experts or None


def _attention(
    weights: DecoderWeights,
    place: int,
    layer: LayerWeights,
    x: torch.Tensor,
    prompt: Prompt,
    cache: KVCache,
    angles: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Causal attention of packed tokens x [N, D], each row for itself. Returns [N, D]."""
    q, k, v = (
        linear(x, dense(matrix), bias).view(1, len(x), -1, weights.head_dim)
        for matrix, bias in ((layer.q, layer.q_bias), (layer.k, layer.k_bias), (layer.v, layer.v_bias))
    )  # [1, N, heads, d]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, weights.eps), rms_norm(k, layer.k_norm, weights.eps)
    if layer.has_rope:
        q, k = rotate(q, *angles), rotate(k, *angles)
    outs, start = [], 0
    for row, length in enumerate(prompt.lengths):
        mine = slice(start, start + length)
        rows = [one[0, mine].transpose(0, 1) for one in (q, k, v)]  # [heads, T, d]
        cache.keys[place, row, :, :length] = rows[1]
        cache.values[place, row, :, :length] = rows[2]
        outs.append(causal(*rows, scale=weights.attention_scale, window=layer.window).transpose(0, 1).flatten(1))
        start += length
    return linear(outs[0] if len(outs) == 1 else torch.cat(outs), dense(layer.o), layer.o_bias)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int) -> torch.Tensor:
    """One row's heads: queries [H, T, d], keys and values [K, T, d]. Returns [H, T, d]."""
    groups, length = q.shape[0] // k.shape[0], q.shape[1]
    if groups > 1:  # repeated, because the fast kernel of torch does not take groups
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    attend = nn.functional.scaled_dot_product_attention
    window = window if window < length else 0
    if not window and not SHORT_BLOCK < length <= 2 * SHORT_BLOCK:
        return attend(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
    size = QUERY_BLOCK if window else SHORT_BLOCK
    parts = []
    for first in range(0, length, size):
        last = min(length, first + size)
        low = max(0, first - window + 1) if window else 0
        mask = _mask(first - low, last - first, window, q.dtype)
        parts.append(attend(q[None, :, first:last], k[None, :, low:last], v[None, :, low:last], mask, scale=scale)[0])
    return torch.cat(parts, 1)


@functools.lru_cache(maxsize=4)
def _mask(past: int, num_queries: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the scores [T, past + T] of queries after `past` keys: 0, or minus infinity."""
    back = torch.arange(past, past + num_queries)[:, None] - torch.arange(past + num_queries)
    hidden = (back < 0) | (back >= window) if window else back < 0
    return torch.zeros(back.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def whole_ffn(ffn: FFNWeights, x: torch.Tensor, activation: str) -> torch.Tensor:
    """The full FFN of tokens x [N, D]."""
    hidden = gated(x, dense(ffn.gate), dense(ffn.up), activation)
    down, bias = ffn.down_of(len(ffn.sizes) - 1)
    return linear(hidden, dense(down), bias)


def grouped_ffn(ffn: FFNWeights, x: torch.Tensor, choice: torch.Tensor, activation: str) -> torch.Tensor:
    """Tokens x [N, D] through the experts [N] chosen for them: sorted by width, one product per block of channels
    over a shrinking prefix. Returns [N, D]."""
    num_experts = len(ffn.sizes)
    order = choice.argsort(descending=True, stable=True)
    counts = torch.bincount(choice, minlength=num_experts)
    reach = counts.flip(0).cumsum(0).flip(0).tolist()  # tokens at least as wide as expert e
    ordered = x[order]
    hidden = x.new_empty(len(x), ffn.sizes[-1])  # a token's row holds its own width; the rest is never read
    gate, up = dense(ffn.gate), dense(ffn.up)
    start = 0
    for expert, stop in enumerate(ffn.sizes):
        if rows := reach[expert]:
            hidden[:rows, start:stop] = gated(ordered[:rows], gate[start:stop], up[start:stop], activation)
        start = stop
    out = torch.empty_like(x)
    for expert, size in enumerate(ffn.sizes):
        low, high = (*reach, 0)[expert + 1], reach[expert]
        if high > low:
            down, bias = ffn.down_of(expert)
            out[low:high] = linear(hidden[low:high, :size], dense(down)[:, :size], bias)
    return torch.empty_like(x).index_copy_(0, order, out)


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate x) * (up x) for tokens x [N, D]; in bfloat16 with both products' last steps done within them."""
    if x.dtype == torch.bfloat16 and activation == "silu":
        opened = torch.ops.mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, opened, up, None, "mul")
    return activate(linear(x, gate), activation) * linear(x, up)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, inputs] times `weight` [outputs, inputs] transposed, plus a bias."""
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
