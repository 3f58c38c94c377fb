"""Reading a prompt: matrix products over all tokens at once, the form that the machine's matrix units like.

Padding costs nothing: the tokens of all rows are packed one after the other, [N, D], and only attention looks at rows
apart. Where a router chose, tokens are sorted by width and each block of channels runs over a shrinking prefix of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rheostat.holding import Account, Parts
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
    """The tokens of a batch of prompts, or of pieces of them, packed without their padding."""

    token_ids: torch.Tensor
    """[N]."""
    positions: torch.Tensor
    """[N], of each row from its past on."""
    lengths: list[int]
    """Tokens of each row."""
    valid: torch.Tensor
    """[B, T] bool, where they stood."""
    rows: list[int]
    """Row of the cache that each is in."""
    pasts: list[int]
    """Tokens of each row that the cache holds before these."""

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rows: Sequence[int] | None = None,
        pasts: Sequence[int] | None = None,
    ) -> Prompt:
        """Pack token ids [B, T]; the mask [B, T] is 0 at padding. Rows of the cache are 0 to B - 1 and empty, unless
        others are named."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = valid.sum(1).tolist()
        befores = [0] * len(lengths) if pasts is None else list(pasts)
        pairs = zip(befores, lengths, strict=True)
        positions = torch.cat([torch.arange(past, past + length) for past, length in pairs])
        places = list(range(len(lengths))) if rows is None else list(rows)
        return cls(input_ids[valid], positions, lengths, valid, places, befores)

    def by_token(self, settings: torch.Tensor) -> torch.Tensor:
        """Settings [B] of the rows, or [N] already, as settings [N] of the tokens."""
        is_by_row = len(settings) == len(self.lengths)  # where both numbers are one, a row is a token
        return settings.repeat_interleave(torch.tensor(self.lengths)) if is_by_row else settings

    @property
    def firsts(self) -> torch.Tensor:
        """Where the first tokens of texts are among the packed: [B], less the rows that have a past."""
        return (self.positions == 0).nonzero()[:, 0]

    @property
    def lasts(self) -> torch.Tensor:
        """[B], where each row's last token is."""
        return torch.tensor(self.lengths).cumsum(0) - 1

    @property
    def ends(self) -> list[int]:
        """Tokens of each row with its past."""
        return [past + length for past, length in zip(self.pasts, self.lengths, strict=True)]


def prefill(
    weights: DecoderWeights,
    prompt: Prompt,
    cache: KVCache,
    settings: torch.Tensor | None,
    rope: RopeTable,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Read prompts into the cache through all layers.

    Args:
        weights: with matrices in the dtype to compute in; the residual stream is float32 all the same.
        prompt: B rows.
        cache: has the prompt's rows, in which tokens begin at slot 0.
        settings: [B] float32, the native setting of each row; None, or 0 in a row, is the full FFN.
        rope: the table for `weights`.

    Returns:
        The last tokens' normalised hidden states [B, D], which the head turns into logits, and each layer's experts
        [N]; None where no router was asked.
    """
    h = embed(weights, prompt)
    experts = run_layers(weights, range(len(weights.layers)), h, prompt, cache, settings, rope)
    set_lengths(cache, prompt)
    return rms_norm(h[prompt.lasts], weights.final_norm, weights.eps), experts


def prefill_held(
    weights: DecoderWeights,
    prompt: Prompt,
    cache: KVCache,
    account: Account,
    asked: Sequence[float],
    rope: RopeTable,
    *,
    is_last: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """The same for prompts that are held to what they asked for, [B]: their settings change every few layers.

    Args:
        is_last: the prompts end here; else more of them will come.
    """
    if min(asked) == 1:
        account.skip(prompt.lengths)
        return prefill(weights, prompt, cache, None, rope)
    h = embed(weights, prompt)
    parts = Parts.of(np.arange(max(prompt.lengths)) < np.array(prompt.lengths)[:, None], prompt.pasts)
    owners = np.arange(len(asked)).repeat(prompt.lengths)
    places = parts.places[owners, prompt.positions.numpy() - np.array(prompt.pasts)[owners]]  # [N]
    reading, bins = account.prompt(asked, parts, is_last=is_last), owners * parts.counts.shape[1] + places
    experts: list[torch.Tensor] = []
    for layers in account.table.groups:
        settings = torch.from_numpy(reading.by_part(layers.start)[owners, places]).float()
        found = run_layers(weights, layers, h, prompt, cache, settings, rope)
        pairs = zip(layers, found or (), strict=False)
        saved = sum(saved_weights(weights.layers[layer].ffn)[chosen.numpy()] for layer, chosen in pairs)  # [N]
        reading.took_parts(layers[-1], np.bincount(bins, saved, parts.counts.size).reshape(parts.counts.shape))
        experts += found or ()
    set_lengths(cache, prompt)
    return rms_norm(h[prompt.lasts], weights.final_norm, weights.eps), experts or None


def saved_weights(ffn: FFNWeights) -> np.ndarray:
    """[E] int64, the weights that a token leaves out with each expert, less those of the router."""
    assert ffn.router is not None
    return _saved_weights(tuple(ffn.sizes), ffn.router.hidden_size, ffn.router.num_weights)


@functools.lru_cache(maxsize=256)
def _saved_weights(sizes: tuple[int, ...], hidden_size: int, num_router_weights: int) -> np.ndarray:
    return 3 * hidden_size * (sizes[-1] - np.array(sizes)) - num_router_weights


def embed(weights: DecoderWeights, prompt: Prompt) -> torch.Tensor:
    """The residual stream [N, D] float32 that enters the first layer."""
    if weights.reader is not None:
        found: torch.Tensor = weights.reader.embed(prompt.token_ids)
        return found
    return dense(weights.embedding)[prompt.token_ids].float()


def set_lengths(cache: KVCache, prompt: Prompt) -> None:
    """The cache's rows hold the prompt now: all layers have written it."""
    cache.lengths[prompt.rows] = torch.tensor(prompt.ends, dtype=torch.int32)


def run_layers(
    weights: DecoderWeights,
    layers: range,
    h: torch.Tensor,
    prompt: Prompt,
    cache: KVCache,
    settings: torch.Tensor | None,
    rope: RopeTable,
) -> list[torch.Tensor] | None:
    """Some layers on tokens whose residual stream is h [N, D] float32, which is changed in place; the native settings
    are of each row [B], or of each token [N].

    Each of these layers writes the tokens' keys and values after each row's past, which it finds in the cache; the
    other layers' are not touched, and neither are the cache's lengths (see `set_lengths`).

    Returns:
        Experts [N] of each routed layer among these; None where no router was asked.
    """
    if weights.reader is not None:
        experts: list[torch.Tensor] | None = weights.reader(layers, h, prompt, cache, settings, rope)
        return experts
    if settings is not None and not bool((settings > 0).any()):
        settings = None
    cache.reserve(max(prompt.ends))
    angles = [one[None] for one in rope.at(prompt.positions)]  # [1, N, r / 2]
    by_token = None if settings is None else prompt.by_token(settings)
    experts = []
    for place in layers:
        layer = weights.layers[place]
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
    return experts or None


def _attention(
    weights: DecoderWeights,
    place: int,
    layer: LayerWeights,
    x: torch.Tensor,
    prompt: Prompt,
    cache: KVCache,
    angles: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Causal attention of packed tokens x [N, D], each row for itself and its past. Returns [N, D]."""
    q, k, v = (
        linear(x, dense(matrix), bias).view(1, len(x), -1, weights.head_dim)
        for matrix, bias in ((layer.q, layer.q_bias), (layer.k, layer.k_bias), (layer.v, layer.v_bias))
    )  # [1, N, heads, d]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, weights.eps), rms_norm(k, layer.k_norm, weights.eps)
    if layer.has_rope:
        q, k = rotate(q, *angles), rotate(k, *angles)
    outs, start = [], 0
    for row, past, length in zip(prompt.rows, prompt.pasts, prompt.lengths, strict=True):
        mine, end = slice(start, start + length), past + length
        queries, keys, values = (one[0, mine].transpose(0, 1) for one in (q, k, v))  # [heads, T, d]
        cache.keys[place, row, :, past:end] = keys
        cache.values[place, row, :, past:end] = values
        if past:
            keys, values = (one[place, row, :, :end].to(x.dtype) for one in (cache.keys, cache.values))
        out = causal(queries, keys, values, scale=weights.attention_scale, window=layer.window)
        outs.append(out.transpose(0, 1).flatten(1))
        start += length
    return linear(outs[0] if len(outs) == 1 else torch.cat(outs), dense(layer.o), layer.o_bias)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int) -> torch.Tensor:
    """One row's heads: queries [H, T, d] of the last T tokens, keys and values [K, S, d]. Returns [H, T, d]."""
    groups, length, end = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    if groups > 1:  # repeated, because the fast kernel of torch does not take groups
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    attend = nn.functional.scaled_dot_product_attention
    window, past = window if window < end else 0, end - length
    if not window and not past and not SHORT_BLOCK < length <= 2 * SHORT_BLOCK:
        return attend(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
    size = QUERY_BLOCK if window or past else SHORT_BLOCK
    parts = []
    for first in range(0, length, size):
        last = min(length, first + size)
        low = max(0, past + first - window + 1) if window else 0
        high = past + last
        mask = None if last - first == 1 else _mask(past + first - low, last - first, window, q.dtype)
        parts.append(attend(q[None, :, first:last], k[None, :, low:high], v[None, :, low:high], mask, scale=scale)[0])
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
