"""Perplexity, next-token accuracy and agreement with the dense model, at a list of dials, on packed text.

Every figure comes from forward passes under the dial, and every run sees the same windows as the dense model, so
differences are paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.eval.profile import Profile
from rheostat.joint import read_and_answer
from rheostat.methods.base import Progress, no_progress
from rheostat.spending import spend


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to run the model: a dial, or a baseline's own choice of experts."""

    label: str
    compute: float = 1.0
    override: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    native: dict[str, float] | None = None
    hold: bool = False
    """Steer each window by what it has spent."""


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
    accuracy_error: float
    """Standard error of `accuracy` less the dense model's, over windows (paired)."""
    agreement: float
    """Share of positions whose most likely token is the dense model's."""
    agreement_error: float
    """Standard error of `agreement`, over windows."""
    flops_per_token: float
    """FLOPs spent a token, attention over the window included."""
    bytes_per_token: int | None
    """Bytes that decoding one token, in a batch of one and after a full window, moves at this mean compute: weights
    and cache, as `Method.cost` counts them from the sizes. None for methods whose cost it cannot tell."""
    num_tokens: int
    """Predicted tokens."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


@dataclass
class _Tally:
    """Sums over batches of one run."""

    meter: Profile = field(default_factory=lambda: Profile(keep_passes=False))
    losses: list[float] = field(default_factory=list)
    """One mean a window."""
    right: list[int] = field(default_factory=list)
    """Positions of each window whose most likely token is the text's."""
    agreed: list[int] = field(default_factory=list)
    """Positions of each window whose most likely token is the dense model's."""
    seconds: float = 0.0
    num_scored: int = 1
    """Positions of each window that were scored."""


@torch.inference_mode()
def evaluate(
    adapted: Adapted,
    windows: torch.Tensor,
    runs: Sequence[Run],
    *,
    batch_tokens: int = 2048,
    progress: Progress = no_progress,
    meters: dict[str, Profile] | None = None,
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
    return [
        _quality(run, tally, tallies[0], adapted, windows.shape[1]) for run, tally in zip(runs, tallies, strict=True)
    ]


def _score(adapted: Adapted, batch: torch.Tensor, run: Run, tally: _Tally, best: torch.Tensor | None) -> torch.Tensor:
    """Add one batch to a tally. Returns the dense model's most likely tokens [B, T-1] (this run's, for the
    first run)."""
    started = time.perf_counter()
    with spend(run.compute, meter=tally.meter, native=run.native, override=run.override, hold=run.hold):
        if adapted.method.at("prefill").reads_prompts:  # what it does shows after a prompt only
            logits, flat = read_and_answer(adapted, batch)
            targets = flat.view(len(batch), -1)
        else:
            logits, targets = adapted(input_ids=batch, use_cache=False).logits[:, :-1], batch[:, 1:]
    tally.seconds += time.perf_counter() - started
    tally.num_scored = targets.shape[1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    mine = logits.argmax(-1)
    best = mine if best is None else best
    tally.losses += losses.view_as(targets).double().mean(1).tolist()
    tally.right += (mine == targets).sum(1).tolist()
    tally.agreed += (mine == best).sum(1).tolist()
    return best


def _quality(run: Run, tally: _Tally, dense: _Tally, adapted: Adapted, length: int) -> Quality:
    num_windows = len(tally.losses)
    num_tokens = num_windows * tally.num_scored
    gap, gap_error = _mean(a - b for a, b in zip(tally.losses, dense.losses, strict=True))
    _, accuracy_error = _mean((a - b) / tally.num_scored for a, b in zip(tally.right, dense.right, strict=True))
    _, agreement_error = _mean(count / tally.num_scored for count in tally.agreed)
    loss, _ = _mean(tally.losses)
    meter = tally.meter
    return Quality(
        label=run.label,
        asked=run.compute,
        compute=meter.compute,
        compute_with_context=meter.compute_with_context,
        ffn_fraction=meter.ffn_fraction,
        loss=loss,
        loss_error=gap_error,
        perplexity=math.exp(loss),
        ratio=math.exp(gap),
        accuracy=sum(tally.right) / num_tokens,
        accuracy_error=accuracy_error,
        agreement=sum(tally.agreed) / num_tokens,
        agreement_error=agreement_error,
        flops_per_token=meter.cost.flops.total / meter.tokens,
        bytes_per_token=decode_bytes(adapted, meter.compute, length),
        num_tokens=num_tokens,
        seconds=tally.seconds,
    )


def _mean(values: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error (0 for a single value, of which nothing is known)."""
    values = list(values)
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / max(1, len(values) - 1) / len(values))


def decode_bytes(adapted: Adapted, compute: float, past: int) -> int | None:
    """Bytes that decoding one token moves after `past` cached ones, in a batch of one, at a mean `compute`.

    None where the method cannot tell: several dials in a chain are known by measurement only.
    """
    method, geometry = adapted.method, adapted.geometry
    reachable = min(1.0, max(method.floor(geometry), compute))  # baselines have no routers, so they end a bit lower
    itemsize = adapted.dtype.itemsize
    try:
        cost = method.cost(geometry, compute=reachable, num_tokens=1, past=past, num_logits=1, itemsize=itemsize)
    except SettingError:
        return None
    return cost.bytes.total
