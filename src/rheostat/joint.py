"""Several methods on one dial: a path of joint settings from the dense model to the cheapest, along the measured front.

Quality is the divergence from the dense model's own words for an answer that follows a prompt. It varies far less from
window to window than a loss on the text does, so few windows tell settings apart. The dense model reads them once.

Shapes: N windows, T tokens, A tokens of an answer, C words told apart, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rheostat.adapted import Adapted
from rheostat.dial import Dial
from rheostat.meter import Meter
from rheostat.methods.base import Method, Progress, no_progress
from rheostat.spending import in_phase, spend

if TYPE_CHECKING:
    from transformers import Cache

PROMPT_SHARE = 0.75
"""Of each window: the rest is what is written after the prompt."""
MAX_LEVELS = 5
"""Settings of each method that a path may use, beside the neutral one."""
MOST_WORDS = 256
"""Of the dense model's next words, so many are told apart and the others count as one: what is kept of a window is
then some hundred kilobytes, whatever the vocabulary. It can only make a divergence smaller."""
BATCH_TOKENS = 2048

At = tuple[int, ...]
"""A point: for each method, which of its levels."""


def read_prompts(adapted: Adapted, prompts: torch.Tensor) -> Cache:
    """Read prompts [N, T] without padding through the method. Returns the filled cache."""
    cache = adapted.method.make_cache(adapted.model)
    adapted.method.prefill(adapted.model, prompts, torch.ones_like(prompts), cache)
    return cache


def read_and_answer(adapted: Adapted, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the first part of each window [N, T] for a prompt, read through the method, and the rest for the answer,
    scored in one pass on the cache that was filled.

    Returns:
        Logits [N, A, V] and the tokens that they should have predicted, [N * A].
    """
    num_prompt = max(1, round(PROMPT_SHARE * windows.shape[1]))
    cache = read_prompts(adapted, windows[:, :num_prompt])
    with in_phase("decode"):
        logits = adapted(input_ids=windows[:, num_prompt:-1], past_key_values=cache, use_cache=True).logits
    return logits, windows[:, num_prompt + 1 :].flatten()


@dataclass(frozen=True)
class Words:
    """What the dense model says at each token of some answers."""

    ids: torch.Tensor
    """[N, A, C], its likeliest next words."""
    log_shares: torch.Tensor
    """[N, A, C + 1] float32: their log-probabilities, and that of all others together."""

    @classmethod
    def of(cls, logits: torch.Tensor) -> Words:
        """From the dense model's logits [N, A, V]."""
        ids = logits.topk(min(MOST_WORDS, logits.shape[-1]), -1).indices
        return cls(ids, _log_shares(logits, ids))

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Nats from the dense model of a model with these logits [N, A, V], at each token [N, A]."""
        return torch.nn.functional.kl_div(
            _log_shares(logits, self.ids), self.log_shares, reduction="none", log_target=True
        ).sum(-1)


def _log_shares(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of words [N, A, C] under logits [N, A, V], and of all others together: [N, A, C + 1]."""
    logits = logits.float()
    known = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    others = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=1e-9)  # float32 sums to 1 within that
    return torch.cat([known, others.log()], -1)


class Answers:
    """What settings spend, and how far they are from the dense model, on windows [N, T] of which the first part is a
    prompt and the rest is written after it. Nothing is measured twice."""

    def __init__(self, adapted: Adapted, windows: torch.Tensor) -> None:
        self.adapted, self.windows = adapted, windows
        self.batches = windows.to(adapted.device).split(max(1, BATCH_TOKENS // windows.shape[1]))
        self.dense = [Words.of(logits) for logits in self._logits({}, Meter(keep_passes=False))]
        self.measured: dict[tuple[float, ...], tuple[float, float]] = {}

    @torch.no_grad()
    def _logits(self, native: dict[str, float], meter: Meter) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            with spend(native=native, meter=meter):
                logits = read_and_answer(self.adapted, batch)[0]
            yield logits

    def measure(self, native: dict[str, float]) -> tuple[float, float]:
        """`compute`, and divergence in nats a token, at a native setting; methods left out are at their neutral one."""
        dialled = self.adapted.method.dialled()
        key = tuple(native.get(method.name, method.neutral()) for method in dialled)
        if key == tuple(method.neutral() for method in dialled):
            return 1.0, 0.0
        if key not in self.measured:
            native, meter = {m.name: one for m, one in zip(dialled, key, strict=True)}, Meter(keep_passes=False)
            pairs = zip(self.dense, self._logits(native, meter), strict=True)
            apart = torch.cat([dense.divergence(logits) for dense, logits in pairs]).mean()
            self.measured[key] = meter.compute, float(apart)
        return self.measured[key]


def levels_of(own: Dial, name: str) -> tuple[float, ...]:
    """What a path may use of a method's own dial: the neutral setting, and others at even steps of `compute`."""
    steps = [1 - (1 - own.low) * k / MAX_LEVELS for k in range(MAX_LEVELS + 1)]
    nearest = [min(range(len(own.compute)), key=lambda i: abs(own.compute[i] - wanted)) for wanted in steps]
    return tuple(own.settings[name][i] for i in dict.fromkeys(nearest))


def walk(
    answers: Answers, dialled: Sequence[Method], levels: Sequence[Sequence[float]], progress: Progress = no_progress
) -> Dial:
    """The dial of several methods: a path from dense to cheapest, along the measured front of quality against compute.

    It goes from point to point, each time turning the one method whose next setting costs the least quality for what it
    saves. So no method is ever turned back, and `compute` falls.

    Args:
        answers: what says how good a setting is.
        levels: of each method, the settings that it offers, its neutral one first.
    """

    def native(at: At) -> dict[str, float]:
        return {m.name: own[i] for m, own, i in zip(dialled, levels, at, strict=True)}

    def measure(at: At) -> tuple[float, float]:
        progress("measuring joint settings", len(answers.measured), len(answers.measured) + 1)
        return answers.measure(native(at))

    def price(start: At, end: At) -> float:
        (spent, apart), (less, further) = measure(start), measure(end)
        return (further - apart) / (spent - less) if spent > less else math.inf

    path = [(0,) * len(dialled)]
    while nexts := list(_neighbours(path[-1], levels)):
        path.append(nexts[0] if len(nexts) == 1 else min(nexts, key=lambda end: price(path[-1], end)))
    kept = path[:1]
    for at in path[1:]:
        if measure(at)[0] < measure(kept[-1])[0] - 1e-7:
            kept.append(at)
    progress("measuring joint settings", len(answers.measured), len(answers.measured))
    windows = answers.windows
    about: dict[str, Any] = {"windows": len(windows), "tokens": windows.numel(), "length": windows.shape[1]}
    about |= {"prompt_share": PROMPT_SHARE, "divergence": [round(measure(at)[1], 5) for at in kept]}
    settings = {m.name: tuple(native(at)[m.name] for at in kept) for m in dialled}
    return Dial(compute=tuple(measure(at)[0] for at in kept), settings=settings, measured_on=about)


def _neighbours(at: At, levels: Sequence[Sequence[float]]) -> Iterator[At]:
    """One method turned one level further."""
    for k, i in enumerate(at):
        if i + 1 < len(levels[k]):
            yield (*at[:k], i + 1, *at[k + 1 :])
