"""The weights of a decoder as the runtime reads them: what to multiply with what, and nothing of how.

A `Matrix` has the shape [outputs, inputs], as `nn.Linear` keeps it. As `building` makes them, all are views of the
model's own parameters; `packing` replaces the large ones by matrices of another format, under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Matrix = Any
"""A `torch.Tensor` [outputs, inputs], or a packed matrix of that `shape` with `nbytes`."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""What may stand between gate and up; `gelu_tanh` is the approximation."""

RULES = ("damage", "confidence")
"""How scores and a setting become an expert (E experts, 0 the smallest; a setting of 0 or less is always E - 1).

- `damage`: E - 1 scores s; the e with the least exp(s_e) + setting * sizes_e / F, where the last expert's first term
  is 0; ties go to the larger.
- `confidence`: E scores; the smallest e whose softmax probability summed over 0..e is at least 1 - setting.
"""


@dataclass(frozen=True, kw_only=True)
class CacheForm:
    """A cache whose older tokens are in two nibble planes (`caches.planes`), the newest in full precision."""

    group_size: int
    """G, tokens of a key group; the newest G to 2G - 1 tokens stay as they are."""
    value_group_size: int = 0
    """Channels of a value group; 0 is the whole head."""


@dataclass(frozen=True, kw_only=True)
class DraftForm:
    """How the model reads itself while it drafts: these weights in 4 bits, and a cache in planes as 4-bit numbers."""

    places: tuple[str, ...]
    """Of ffn, attention, head."""


@dataclass(frozen=True, kw_only=True)
class RouterWeights:
    """Chooses an expert: scores = outer(silu(inner(x)))."""

    key: str
    """Name of the native setting that it obeys."""
    rule: str
    """One of `RULES`."""
    inner: torch.Tensor
    """[U, D]."""
    inner_bias: torch.Tensor
    """[U]."""
    outer: torch.Tensor
    """[E - 1, U] for `damage`, [E, U] for `confidence`."""
    outer_bias: torch.Tensor

    @property
    def num_weights(self) -> int:
        """Weights multiplied for one token."""
        return math.prod(self.inner.shape) + math.prod(self.outer.shape)

    @property
    def hidden_size(self) -> int:
        """D, what it reads."""
        return int(self.inner.shape[1])


@dataclass(frozen=True, kw_only=True)
class FFNWeights:
    """A gated FFN whose experts are prefixes of its channels; a dense one has a single expert."""

    gate: Matrix
    """[F, D]."""
    up: Matrix
    """[F, D]."""
    downs: tuple[Matrix, ...]
    """One for all experts, [D, F], of which each takes its first columns; or E, each [D, sizes[e]]."""
    down_biases: tuple[torch.Tensor | None, ...]
    """[D] of each of `downs`."""
    sizes: tuple[int, ...]
    """Channels of each expert, rising; the last is F."""
    router: RouterWeights | None = None
    """None for a single expert."""

    def down_of(self, expert: int) -> tuple[Matrix, torch.Tensor | None]:
        """The matrix that an expert multiplies with (its first `sizes[expert]` columns), and its bias."""
        place = expert if len(self.downs) > 1 else 0
        return self.downs[place], self.down_biases[place]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer: h + o(attention(norm(h))), then h + ffn(norm(h))."""

    input_norm: torch.Tensor
    """[D], of the RMS norm before attention."""
    q: Matrix
    """[H * d, D]."""
    k: Matrix
    """[K * d, D]."""
    v: Matrix
    """[K * d, D]."""
    o: Matrix
    """[D, H * d]."""
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    """[d], of an RMS norm over each head, before the rotation."""
    k_norm: torch.Tensor | None = None
    has_rope: bool = True
    """Whether queries and keys are rotated."""
    window: int = 0
    """A token attends to itself and the `window - 1` before it; 0 is no limit."""
    post_norm: torch.Tensor
    """[D], of the RMS norm before the FFN."""
    ffn: FFNWeights


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """A whole decoder with its head."""

    embedding: Matrix
    """[V, D], of which rows are looked up."""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    """[D]."""
    head: Matrix
    """[V, D]; `embedding` itself where they are tied."""
    inv_freq: torch.Tensor
    """[r / 2] float32, angles per position of the rotated part r <= d of each head (its first channels, halves
    paired: channel i with channel i + r / 2)."""
    rope_scale: float = 1.0
    """What cosine and sine are multiplied with."""
    num_heads: int
    """H."""
    num_kv_heads: int
    """K."""
    head_dim: int
    """d."""
    attention_scale: float
    """What scores are multiplied with before the softmax."""
    eps: float
    """Of all RMS norms: x / sqrt(mean(x^2) + eps) * weight."""
    activation: str
    """One of `ACTIVATIONS`."""
    max_positions: int
    reader: Any = None
    """Takes prompts through the layers natively (`kernels.NativeReader`); None: plain PyTorch does."""

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.final_norm.shape[0])

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.head.shape[0])

    @property
    def is_routed(self) -> bool:
        """Whether there is anything to choose."""
        return any(layer.ffn.router is not None for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class PredictedLayers:
    """Linear maps that give a prompt's keys and values in all layers from `depth` on, once those below have read it."""

    depth: int
    reads: tuple[int, ...]
    """Layers, up to `depth`, whose normalised input [N, D] is read, side by side."""
    previous: tuple[int, ...] = ()
    """Layers of which the input of the token before is read too, after those: X = the number of both times D. A token's
    own is read where the one before is a text's first, or was read in an earlier pass."""
    squeeze: Matrix | None
    """[R, X], of all maps together; None where they read the X features themselves (R = X)."""
    maps: tuple[Matrix, ...]
    """Of each layer from `depth` on, [2 K d, R]: keys as they leave the projection, then values. Or all layers' in one
    matrix, one below the other."""
    biases: tuple[torch.Tensor, ...]
    """[2 K d] of each layer, or of all."""
    firsts: tuple[torch.Tensor, ...]
    """[2 K d] of each layer, or of all: what a text's first token has instead."""
    reader: Any = None
    """Reads prompts ahead natively (`kernels.NativeAhead`), with the same matrices; None: plain PyTorch does."""

    @property
    def num_weights(self) -> int:
        """Weights multiplied for one token."""
        return sum(math.prod(one.shape) for one in self.matrices)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All that a token is multiplied with."""
        return self.maps if self.squeeze is None else (self.squeeze, *self.maps)


@dataclass(frozen=True, kw_only=True)
class ReadAhead:
    """How prompts are read with their upper layers predicted; only the last tokens pass all layers."""

    key: str
    """Name of the native setting that decides on the depth."""
    num_exact: int
    """Tokens at a prompt's end that pass all layers; 1 at least."""
    layers: Mapping[int, PredictedLayers]
    """By depth."""
    depth_at: Callable[[float], int | None]
    """Native setting -> depth; None for all layers."""
    hook_ids: frozenset[int] = frozenset()
    """Of hooks on the model that do nothing in what the runtime replaces."""
