"""What a forward pass costs, by part, in exact integers. Computed from the geometry, never from weights.

Conventions: a product with a weight is two FLOPs; norms, activations, softmax and look-ups are not counted.
`scores` are the two products of attention that grow with the context (queries with keys, weights with values);
everything else costs the same for every token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from rheostat.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One quantity (FLOPs, or bytes) split by the part of the model that spends it."""

    attention: int = 0
    """Query, key, value and output projections."""
    scores: int = 0
    """Attention over the context: FLOPs of both products, or bytes of cache read and written."""
    ffn: int = 0
    router: int = 0
    head: int = 0
    auxiliary: int = 0
    draft: int = 0

    def __add__(self, other: Parts) -> Parts:
        return Parts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def flat(self) -> int:
        """All parts that do not depend on the context: the numerator and denominator of `compute`."""
        return self.total - self.scores


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs and bytes by part. Costs add."""

    flops: Parts = field(default_factory=Parts)
    bytes: Parts = field(default_factory=Parts)

    def __add__(self, other: Cost) -> Cost:
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain types, for JSON."""
        return asdict(self)


def attended(num_tokens: int, past: int, window: int = 0) -> int:
    """How many (query, key) pairs `num_tokens` new tokens form after `past` cached ones, with an optional window."""
    first, last = past + 1, past + num_tokens  # keys seen by the first and by the last query
    if not window or last <= window:
        return (first + last) * num_tokens // 2
    growing = max(0, window - past)  # queries that still see everything
    return (2 * past + 1 + growing) * growing // 2 + (num_tokens - growing) * window


def attention_cost(geometry: Geometry, num_tokens: int, past: int, itemsize: int) -> Cost:
    """All layers' attention for one row of `num_tokens` new tokens after `past` cached ones; weights are not billed.

    The weights are read once a pass, not once a row: see `attention_weight_bytes`.
    """
    windows = geometry.windows or (0,) * geometry.num_layers
    pairs = sum(attended(num_tokens, past, window) for window in windows)
    read = sum(min(past + num_tokens, window) if window else past + num_tokens for window in windows)
    written = geometry.num_layers * num_tokens
    return Cost(
        flops=Parts(
            attention=2 * geometry.num_layers * geometry.attention_weights * num_tokens,
            scores=4 * geometry.num_heads * geometry.head_dim * pairs,
        ),
        bytes=Parts(scores=(read + written) * geometry.kv_values * itemsize),
    )


def attention_weight_bytes(geometry: Geometry, itemsize: int) -> Cost:
    """Reading every layer's attention weights once, as each forward pass does."""
    return Cost(bytes=Parts(attention=geometry.num_layers * geometry.attention_weights * itemsize))


def ffn_cost(geometry: Geometry, num_tokens: int, num_layers: int, itemsize: int) -> Cost:
    """`num_layers` dense FFNs on `num_tokens` tokens in one pass."""
    weights = num_layers * geometry.ffn_weights
    return Cost(flops=Parts(ffn=2 * weights * num_tokens), bytes=Parts(ffn=weights * itemsize))


def head_cost(geometry: Geometry, num_tokens: int, itemsize: int) -> Cost:
    """The output head on `num_tokens` positions in one pass."""
    return Cost(
        flops=Parts(head=2 * geometry.head_weights * num_tokens),
        bytes=Parts(head=geometry.head_weights * itemsize),
    )


def dense_cost(geometry: Geometry, *, num_tokens: int, past: int, num_logits: int, itemsize: int) -> Cost:
    """One forward pass of the dense model over one row.

    Args:
        geometry: the model.
        num_tokens: T, new tokens.
        past: S, tokens already in the cache.
        num_logits: positions for which the head is computed.
        itemsize: bytes of one weight and of one cached number.
    """
    cost = attention_cost(geometry, num_tokens, past, itemsize) + attention_weight_bytes(geometry, itemsize)
    cost += ffn_cost(geometry, num_tokens, geometry.num_layers, itemsize)
    return cost + head_cost(geometry, num_logits, itemsize) if num_logits else cost
