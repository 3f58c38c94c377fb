"""Perplexity, next-token accuracy and agreement with the dense model, at a list of dials, on packed text.

Every figure comes from forward passes under the dial, and every run sees the same windows as the dense model, so
differences are paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rheostat.adapted import Adapted
from rheostat.meter import Meter
from rheostat.methods.base import Progress, no_progress
from rheostat.spending import spend


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to run the model: a dial, or a baseline's own choice of experts."""

    label: str
    compute: float = 1.0
    override: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    native: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What one run scored on one text, and what it spent."""

    label: str
    asked: float
    """`compute` asked for."""
    compute: float
    """`compute` spent: FLOPs in products with weights as a fraction of dense."""
    compute_with_context: float
    """All FLOPs, attention over the context included, as a fraction of dense."""
    ffn_fraction: float
    """Mean FFN width."""
    loss: float
    """Mean negative log-likelihood in nats a token."""
    loss_error: float
    """Standard error of `loss` less the dense model's, over windows (paired)."""
    perplexity: float
    ratio: float
    """Perplexity divided by the dense model's."""
    accuracy: float
    """Share of positions whose most likely token is the text's."""
    agreement: float
    """Share of positions whose most likely token is the dense model's."""
    num_tokens: int
    """Predicted tokens."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


@dataclass
class _Tally:
    """Sums over batches of one run."""

    meter: Meter = field(default_factory=lambda: Meter(keep_passes=False))
    losses: list[float] = field(default_factory=list)
    """One mean a window."""
    right: int = 0
    agreed: int = 0
    seconds: float = 0.0


@torch.inference_mode()
def evaluate(
    adapted: Adapted,
    windows: torch.Tensor,
    runs: Sequence[Run],
    *,
    batch_tokens: int = 2048,
    progress: Progress = no_progress,
    meters: dict[str, Meter] | None = None,
) -> list[Quality]:
    """Score windows [N, T] dense and under each run; the dense model comes first in the result.

    Args:
        meters: filled with each run's meter by label, where given.
    """
    runs = [Run(label="dense"), *runs]
    tallies = [_Tally() for _ in runs]
    step = max(1, batch_tokens // windows.shape[1])
    for start in range(0, len(windows), step):
        progress("scoring", start, len(windows))
        batch = windows[start : start + step].to(adapted.device)
        best: torch.Tensor | None = None
        for run, tally in zip(runs, tallies, strict=True):
            best = _score(adapted, batch, run, tally, best)
    progress("scoring", len(windows), len(windows))
    if meters is not None:
        meters |= {run.label: tally.meter for run, tally in zip(runs, tallies, strict=True)}
    num_tokens = windows.numel() - len(windows)
    dense = tallies[0].losses
    return [_quality(run, tally, dense, num_tokens) for run, tally in zip(runs, tallies, strict=True)]


def _score(adapted: Adapted, batch: torch.Tensor, run: Run, tally: _Tally, best: torch.Tensor | None) -> torch.Tensor:
    """Add one batch to a tally. Returns the dense model's most likely tokens [B, T-1] (this run's, for the
    first run)."""
    started = time.perf_counter()
    with spend(run.compute, meter=tally.meter, native=run.native, override=run.override):
        logits = adapted(input_ids=batch, use_cache=False).logits[:, :-1]
    tally.seconds += time.perf_counter() - started
    targets = batch[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    mine = logits.argmax(-1)
    best = mine if best is None else best
    tally.losses += losses.view_as(targets).double().mean(1).tolist()
    tally.right += int((mine == targets).sum())
    tally.agreed += int((mine == best).sum())
    return best


def _quality(run: Run, tally: _Tally, dense: list[float], num_tokens: int) -> Quality:
    mean = sum(tally.losses) / len(tally.losses)
    gaps = [a - b for a, b in zip(tally.losses, dense, strict=True)]
    gap = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((g - gap) ** 2 for g in gaps) / max(1, len(gaps) - 1) / len(gaps))
    meter = tally.meter
    return Quality(
        label=run.label,
        asked=run.compute,
        compute=meter.compute,
        compute_with_context=meter.compute_with_context,
        ffn_fraction=meter.ffn_fraction,
        loss=mean,
        loss_error=spread,
        perplexity=math.exp(mean),
        ratio=math.exp(gap),
        accuracy=tally.right / num_tokens,
        agreement=tally.agreed / num_tokens,
        num_tokens=num_tokens,
        seconds=tally.seconds,
    )
