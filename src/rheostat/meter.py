"""What a run really spent, filled in by the model while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from rheostat.cost import Cost, Parts
from rheostat.errors import bad_setting

SIDE_PARTS = ("auxiliary", "draft")
"""Parts that whole passes are charged to."""

PARTS = tuple(one.name for one in fields(Parts))


def _cost(sums: dict[str, list[int]]) -> Cost:
    flops, num_bytes = ({part: pair[k] for part, pair in sums.items()} for k in (0, 1))
    return Cost(flops=Parts(**flops), bytes=Parts(**num_bytes))


@dataclass
class PassRecord:
    """One forward pass: which tokens it took and how wide each token's FFN was."""

    phase: str
    """`prefill` or `decode`."""
    valid: torch.Tensor
    """[B, T] bool, False for padding."""
    ffn_channels: torch.Tensor
    """[B, T] int64, FFN channels computed for the token, summed over layers."""


@dataclass
class Speculation:
    """What drafting came to, over rows and rounds. A round is one pass of the model for one row."""

    num_rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    """At each place of the draft, in how many rounds a token was drafted there."""
    accepted: list[int] = field(default_factory=list)
    """And in how many of these it was accepted."""
    verdict: str = ""
    """What `draft_length="auto"` made of the times it measured; empty where it was not asked."""

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """One row's round."""
        self.num_rounds += 1
        longer = num_drafted - len(self.drafted)
        self.drafted += [0] * longer
        self.accepted += [0] * longer
        for place in range(num_drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < num_accepted

    @property
    def acceptance(self) -> float:
        """Accepted tokens / drafted tokens; 0 where none was drafted."""
        return sum(self.accepted) / sum(self.drafted) if self.drafted else 0.0

    @property
    def by_place(self) -> list[float]:
        """The same at each place of the draft; what comes after a rejection is not accepted."""
        return [a / d for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def tokens_per_round(self) -> float:
        """Tokens written for each pass of the model: those accepted and one of its own."""
        return 1 + sum(self.accepted) / self.num_rounds if self.num_rounds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Figures for a report."""
        return {
            "rounds": self.num_rounds,
            "drafted": sum(self.drafted),
            "accepted": sum(self.accepted),
            "acceptance": self.acceptance,
            "acceptance_by_place": self.by_place,
            "tokens_per_round": self.tokens_per_round,
            "verdict": self.verdict,
        }


@dataclass
class Meter:
    """Counts tokens, costs and expert widths. Made by `rheostat.spend`; read it during or after the block.

    Padding is neither counted as a token nor billed. On a plain model the meter equals `cost.dense_cost` to the last
    byte, pass by pass. What may differ from a method's own `cost`, which knows the dial and not the text:

    - a method that decides token by token spends what the tokens asked for; its `cost` is the mean that was calibrated;
    - in a pass of several tokens a width that only one of them took is read for all;
    - `cost` knows rows alike; the meter bills each row for its own tokens and leaves padding out.
    """

    num_layers: int = 0
    ffn_size: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_side_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDE_PARTS, 0))
    """Tokens of auxiliary and draft passes, which are not among the others."""
    expert_counts: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> [E] int64, how many tokens took each expert."""
    passes: list[PassRecord] = field(default_factory=list)
    """The passes in order; `last` is the newest."""
    speculation: Speculation = field(default_factory=Speculation)
    """What drafts were made and accepted."""
    keep_passes: bool = True
    """Keep every pass (needed to colour tokens) or only the newest."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def cost(self) -> Cost:
        """Spent."""
        return _cost(self._spent)

    @property
    def dense(self) -> Cost:
        """What the dense model would have spent on the same passes."""
        return _cost(self._dense)

    @property
    def tokens(self) -> int:
        """Tokens processed, padding excluded."""
        return self.num_prefill_tokens + self.num_decode_tokens

    @property
    def compute(self) -> float:
        """FLOPs spent in products with weights (routers included), as a fraction of the dense model's.

        This is the quantity that the dial asks for. Attention over the context is in `compute_with_context`.
        """
        return self.cost.flops.flat / self.dense.flops.flat if self.dense.flops.flat else 1.0

    @property
    def compute_with_context(self) -> float:
        """All FLOPs spent, attention over the context included, as a fraction of the dense model's."""
        return self.cost.flops.total / self.dense.flops.total if self.dense.flops.total else 1.0

    @property
    def ffn_fraction(self) -> float:
        """Mean FFN width over layers and the tokens that the model itself ran on, as a fraction of the full width."""
        full = self.dense.flops.ffn - self._spared
        return self.cost.flops.ffn / full if full else 1.0

    @property
    def seconds(self) -> float:
        """Wall-clock time since the block was entered."""
        return time.perf_counter() - self.started

    def token_fractions(self, row: int = 0) -> list[float]:
        """Mean FFN width of each token of one row, in order over all kept passes, as a fraction of the full width."""
        full = self.num_layers * self.ffn_size
        out: list[float] = []
        for one in self.passes:
            out += [n / full for n in one.ffn_channels[row][one.valid[row]].tolist()]
        return out

    def layer_fractions(self) -> list[float]:
        """Mean FFN width of each routed layer over tokens, as a fraction of the full width."""
        out = []
        for layer in sorted(self.expert_counts):
            counts, sizes = self.expert_counts[layer].double(), self._sizes[layer].double()
            out.append(float((counts * sizes).sum() / (counts.sum() * self.ffn_size)) if counts.sum() else 1.0)
        return out

    def widths_taken(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each routed layer, how many tokens [E] took each expert, and the experts' widths [E] in channels."""
        for layer in sorted(self.expert_counts):
            yield self.expert_counts[layer], self._sizes[layer]

    side_bytes: dict[str, int] = field(default_factory=dict, repr=False)
    """Bytes charged to side passes, by the part that they would have been: 4-bit weights save a share of them."""
    _spared: int = field(default=0, repr=False)
    """FLOPs of FFNs on tokens that side passes took in: no FFN was narrower for it."""
    _charged: str | None = field(default=None, repr=False)
    _is_checking: bool = field(default=False, repr=False)
    _sizes: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _spent: dict[str, list[int]] = field(default_factory=lambda: {part: [0, 0] for part in PARTS}, repr=False)
    _dense: dict[str, list[int]] = field(default_factory=lambda: {part: [0, 0] for part in PARTS}, repr=False)
    """Part -> FLOPs and bytes so far: plain lists, because every layer of every pass adds to them."""

    # What the model and the methods call while they run.

    @property
    def counts_widths(self) -> bool:
        """Whether widths and experts are counted now: not while whole passes are charged to a side part."""
        return self._charged is None

    @contextmanager
    def charging(self, part: str) -> Iterator[None]:
        """Forward passes inside the block are work that the dense model would not have done: their flat cost goes to
        `auxiliary` or `draft`, and their tokens and widths are not among the model's own.

        Raises:
            SettingError: for another part.
        """
        if part not in SIDE_PARTS:
            raise bad_setting("part", part, f"one of {', '.join(SIDE_PARTS)}")
        before, self._charged = self._charged, part
        try:
            yield
        finally:
            self._charged = before

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Passes inside check drafts: what they spend counts, but what the dense model would have spent depends on how
        many tokens come out, and is told by `owe`."""
        before, self._is_checking = self._is_checking, True
        try:
            yield
        finally:
            self._is_checking = before

    def owe(self, dense: Cost, num_tokens: int) -> None:
        """The dense model would have spent this to write the `num_tokens` tokens that were checked and kept."""
        self.num_decode_tokens += num_tokens
        for part in PARTS:
            self._dense[part][0] += getattr(dense.flops, part)
            self._dense[part][1] += getattr(dense.bytes, part)

    def side_tokens(self, number: int) -> None:
        """Passes that are charged to a side part take so many tokens."""
        assert self._charged is not None
        self.num_side_tokens[self._charged] += number

    def open_pass(self, phase: str, valid: torch.Tensor, num_layers: int, ffn_size: int) -> None:
        """A forward pass begins on the tokens marked in `valid` [B, T]."""
        if self._charged is not None:
            self.side_tokens(int(valid.sum()))
            return
        self.num_layers, self.ffn_size = num_layers, ffn_size
        record = PassRecord(phase, valid, torch.zeros(valid.shape, dtype=torch.int64, device=valid.device))
        self.passes = [*self.passes, record] if self.keep_passes else [record]
        num_tokens = 0 if self._is_checking else int(valid.sum())
        if phase == "prefill":
            self.num_prefill_tokens += num_tokens
        else:
            self.num_decode_tokens += num_tokens

    def add(
        self, part: str, flops: int, num_bytes: int, dense_flops: int, dense_bytes: int, *, own_bytes: int = 0
    ) -> None:
        """Add to one part what was spent, and what the dense model would have spent in its place. Of the bytes,
        `own_bytes` are of weights that the method brought along, of which no draft has a smaller copy."""
        if self._charged is not None:
            self.side_bytes[part] = self.side_bytes.get(part, 0) + num_bytes - own_bytes
            part = part if part == "scores" else self._charged
            dense_flops = dense_bytes = 0
        if self._is_checking:
            dense_flops = dense_bytes = 0
        for sums, f, b in ((self._spent[part], flops, num_bytes), (self._dense[part], dense_flops, dense_bytes)):
            sums[0] += f
            sums[1] += b

    def bill(self, cost: Cost) -> None:
        """Add what was spent where the dense model would have spent the same."""
        for part in PARTS:
            flops, num_bytes = getattr(cost.flops, part), getattr(cost.bytes, part)
            if flops or num_bytes:
                self.add(part, flops, num_bytes, flops, num_bytes)

    def spare(self, phase: str, valid: torch.Tensor, dense: Cost) -> None:
        """Tokens marked in `valid` [B, T] were taken in by side passes in the model's stead, which would have spent
        `dense` on them."""
        self.open_pass(phase, valid, self.num_layers, self.ffn_size)
        for part in PARTS:
            flops, num_bytes = getattr(dense.flops, part), getattr(dense.bytes, part)
            self.add(part, 0, 0, flops, num_bytes)
        self._spared += dense.flops.ffn

    def widths(self, channels: torch.Tensor | int) -> None:
        """FFN channels [B, T] that one layer (or all unrouted layers together) computed for each token of this pass."""
        if self.passes and self._charged is None:
            self.passes[-1].ffn_channels += channels

    def experts(self, layer: int, counts: torch.Tensor, sizes: torch.Tensor) -> None:
        """How many tokens [E] of this pass took each expert of `layer`, and the experts' widths [E] in channels."""
        if self._charged is not None:
            return
        old = self.expert_counts.get(layer)
        self.expert_counts[layer] = counts if old is None else old + counts
        self._sizes[layer] = sizes
