"""What goes into the engine and what comes out of it: plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rheostat.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt to continue, one or several times."""

    id: str
    prompt: list[int]
    max_new_tokens: int
    prefill_compute: float = 1.0
    compute: float = 1.0
    """For the answer."""
    compute_min: float | None = None
    """How far a busy server may lower it; None is not at all."""
    is_held: bool = False
    """Steer it by what it has spent, where the model can be."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    n: int = 1
    stops: tuple[str, ...] = ()
    num_top: int | None = None
    """Alternatives to report with each token; None reports no probabilities."""
    ignores_end: bool = False
    """Go on to `max_new_tokens` whatever comes: for measurements."""
    deadline: float | None = None
    """On the monotonic clock; what is not done by then is cut off."""


@dataclass(frozen=True)
class TokenProbability:
    """One token and how likely it was."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token was written."""

    row: int
    text: str
    """What can be shown now: may be empty, and may hold what earlier tokens could not show."""
    token_id: int
    width: float
    """FFN width of the pass that chose it, as a fraction."""
    layers: list[float] | None = None
    compute: float = 1.0
    """What that pass was asked to spend."""
    logprob: float | None = None
    top: tuple[TokenProbability, ...] = ()


@dataclass(frozen=True)
class RowDone:
    """A row has ended; `text` is what was held back."""

    row: int
    reason: str
    """`stop` or `length`."""
    text: str


@dataclass(frozen=True)
class Done:
    """All rows have ended."""

    bill: Bill


@dataclass(frozen=True)
class Failed:
    """The job will not be finished."""

    status: int
    """As HTTP would say it."""
    message: str


Event = Token | RowDone | Done | Failed
Sink = Callable[[Event], None]
"""Takes a job's events, in the engine's thread; must not block."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a job spent."""

    asked: dict[str, float]
    target: float
    """What its passes were run at, on the whole: `asked`, less where a busy server lowered it."""
    is_held: bool
    """It was steered by what it spent."""
    compute: float
    """Spent, as a fraction of the dense model's FLOPs."""
    compute_with_context: float
    ffn_fraction: float
    flops: int
    dense_flops: int
    tokens_by_width: dict[str, int]
    """FFN width as a fraction -> how often a token took it in a layer."""
    num_prompt_tokens: int
    num_new_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    is_lowered: bool
    """A busy server went below what was asked."""
    lowest: float
    """The least `compute` that a pass was run at."""
    queue_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    total_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `usage.compute` of an answer."""
        return {
            "asked": self.asked["decode"] if self.asked["prefill"] == self.asked["decode"] else self.asked,
            "target": round(self.target, 6),
            "held": self.is_held,
            "spent": round(self.compute, 6),
            "spent_with_context": round(self.compute_with_context, 6),
            "lowered": self.is_lowered,
            "lowest": round(self.lowest, 6),
            "ffn_fraction": round(self.ffn_fraction, 6),
            "flops": self.flops,
            "dense_flops": self.dense_flops,
            "tokens_by_width": self.tokens_by_width,
            "draft_tokens": self.num_draft_tokens,
            "accepted_draft_tokens": self.num_accepted_tokens,
            "queue_ms": round(1e3 * self.queue_seconds, 3),
            "time_to_first_token_ms": round(1e3 * self.first_token_seconds, 3),
            "total_ms": round(1e3 * self.total_seconds, 3),
        }
