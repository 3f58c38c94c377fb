"""What a forward pass costs, by part, in exact integers. Computed from the geometry, never from weights.

Conventions. FLOPs: a product with a weight is two; norms, biases, activations, softmax, rotary tables and look-ups
are not counted. Bytes are those that have to cross the memory bus: each weight once a pass, however many tokens
share it; of the embedding matrix the rows looked up; of the cache what the new tokens see, read once, and their own
keys and values, written once. Activations, norms and biases, which are few or stay in the processor's own memory,
are not counted.
`scores` are the two products of attention that grow with the context (queries with keys, weights with values) and
the traffic of the cache; everything else costs the same for every token. Causal attention is billed for the pairs
that count: a kernel that computes the whole square, as eager attention does, runs more than is billed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache

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
    embeddings: int = 0
    """Rows of the embedding matrix looked up: bytes only."""
    auxiliary: int = 0
    """Passes that prepare the cache in the model's stead; their attention over the context is in `scores`."""
    draft: int = 0
    """Passes that guess tokens for the model to check; their attention over the context is in `scores`."""

    def __add__(self, other: Parts) -> Parts:
        return Parts(**{name: mine + getattr(other, name) for name, mine in vars(self).items()})

    def times(self, number: int) -> Parts:
        """Every part `number` times."""
        return Parts(**{name: mine * number for name, mine in vars(self).items()})

    @property
    def total(self) -> int:
        """All parts."""
        return sum(vars(self).values())

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

    def times(self, number: int) -> Cost:
        """The cost `number` times."""
        return Cost(flops=self.flops.times(number), bytes=self.bytes.times(number))

    def charged_to(self, part: str) -> Cost:
        """The same cost as that of an `auxiliary` or a `draft` pass: everything flat in that one part."""
        flops, num_bytes = (Parts(**{part: one.flat, "scores": one.scores}) for one in (self.flops, self.bytes))
        return Cost(flops=flops, bytes=num_bytes)

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


def seen(num_tokens: int, past: int, window: int = 0) -> int:
    """How many keys at least one of `num_tokens` new tokens attends to, after `past` cached ones."""
    if not num_tokens:
        return 0
    return num_tokens + (min(past, window - 1) if window else past)


@cache
def _kinds(windows: tuple[int, ...], num_layers: int) -> tuple[tuple[int, int], ...]:
    """Each window with the number of layers that have it: there are two at most, and this runs at every token."""
    return tuple(Counter(windows or (0,) * num_layers).items())


def attention_cost(geometry: Geometry, num_tokens: int, past: int, itemsize: int) -> Cost:
    """All layers' attention for one row of `num_tokens` new tokens after `past` cached ones; weights are not billed.

    The weights are read once a pass, not once a row: see `attention_weight_bytes`.
    """
    kinds = _kinds(geometry.windows, geometry.num_layers)
    pairs = sum(number * attended(num_tokens, past, window) for window, number in kinds)
    read = sum(number * seen(num_tokens, past, window) for window, number in kinds)
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


def router_cost(num_weights: int, num_tokens: int, itemsize: int) -> Cost:
    """Routers of `num_weights` weights in all on `num_tokens` tokens in one pass."""
    return Cost(flops=Parts(router=2 * num_weights * num_tokens), bytes=Parts(router=num_weights * itemsize))


def head_cost(geometry: Geometry, num_tokens: int, itemsize: int) -> Cost:
    """The output head on `num_tokens` positions in one pass."""
    return Cost(
        flops=Parts(head=2 * geometry.head_weights * num_tokens),
        bytes=Parts(head=geometry.head_weights * itemsize),
    )


def embedding_cost(geometry: Geometry, num_tokens: int, itemsize: int) -> Cost:
    """Looking up the rows of `num_tokens` tokens."""
    return Cost(bytes=Parts(embeddings=geometry.hidden_size * num_tokens * itemsize))


def rows_cost(geometry: Geometry, counts: Iterable[tuple[int, int]], num_ffns: int, itemsize: int) -> Cost:
    """One pass without the head over rows of so many (cached, new) tokens; the dense FFNs of `num_ffns` layers."""
    cost, total = attention_weight_bytes(geometry, itemsize), 0
    for (past, new), number in Counter(counts).items():
        cost += attention_cost(geometry, new, past, itemsize).times(number)
        total += new * number
    return cost + ffn_cost(geometry, total, num_ffns, itemsize) + embedding_cost(geometry, total, itemsize)


def prediction_cost(geometry: Geometry, num_layers: int, num_weights: int, num_tokens: int, itemsize: int) -> Cost:
    """Maps of `num_weights` weights in all that predict what `num_layers` layers cache for `num_tokens` tokens, keys
    and values written once."""
    written = num_layers * geometry.kv_values * num_tokens
    cost = router_cost(num_weights, num_tokens, itemsize).charged_to("auxiliary")
    return cost + Cost(bytes=Parts(scores=written * itemsize))


def dense_cost(
    geometry: Geometry, *, num_tokens: int, past: int, num_logits: int, itemsize: int, num_rows: int = 1
) -> Cost:
    """One forward pass of the dense model over `num_rows` rows alike.

    Args:
        geometry: the model.
        num_tokens: T, new tokens of a row.
        past: S, tokens already in the cache, of a row.
        num_logits: positions of a row for which the head is computed. A prompt that is read to be continued needs 1;
            text that is scored needs all.
        itemsize: bytes of one weight and of one cached number.
        num_rows: B.
    """
    cost = attention_weight_bytes(geometry, itemsize)
    cost += attention_cost(geometry, num_tokens, past, itemsize).times(num_rows)
    cost += ffn_cost(geometry, num_tokens * num_rows, geometry.num_layers, itemsize)
    cost += embedding_cost(geometry, num_tokens * num_rows, itemsize)
    return cost + head_cost(geometry, num_logits * num_rows, itemsize) if num_logits else cost


def decode_cost(geometry: Geometry, *, num_steps: int, past: int, itemsize: int, num_rows: int = 1) -> Cost:
    """`num_steps` passes of one token a row, the first with `past` tokens of a row in the cache.

    To write N tokens after a prompt takes N - 1 of them: the prompt's own pass gives the first token.
    """
    kinds = _kinds(geometry.windows, geometry.num_layers)
    read = sum(number * attended(num_steps, past, window) for window, number in kinds)  # a key for each pair
    scores = Cost(
        flops=Parts(
            attention=2 * geometry.num_layers * geometry.attention_weights * num_steps,
            scores=4 * geometry.num_heads * geometry.head_dim * read,
        ),
        bytes=Parts(scores=(read + geometry.num_layers * num_steps) * geometry.kv_values * itemsize),
    )
    return scores.times(num_rows) + _flat_step_cost(geometry, itemsize, num_rows).times(num_steps)


@cache  # speculation asks in every round
def _flat_step_cost(geometry: Geometry, itemsize: int, num_rows: int) -> Cost:
    """One pass of one token a row, without attention over the context and its projections' FLOPs."""
    cost = attention_weight_bytes(geometry, itemsize) + ffn_cost(geometry, num_rows, geometry.num_layers, itemsize)
    return cost + embedding_cost(geometry, num_rows, itemsize) + head_cost(geometry, num_rows, itemsize)


def rows_decode_cost(geometry: Geometry, *, news: list[int], pasts: list[int], num_steps: int, itemsize: int) -> Cost:
    """What plain decoding takes to write another number of tokens in each row.

    Args:
        news: tokens written, for each row.
        pasts: tokens in the cache before, for each row.
        num_steps: passes over which these rows' weights are shared: each pass reads the weights once.
    """
    cost = Cost()
    for new, past in zip(news, pasts, strict=True):
        cost += decode_cost(geometry, num_steps=new, past=past, itemsize=itemsize)
    weights = _flat_step_cost(geometry, itemsize, 1).bytes
    shared = Parts(attention=weights.attention, ffn=weights.ffn, head=weights.head)
    return cost + Cost(bytes=shared.times(num_steps - sum(news)))
