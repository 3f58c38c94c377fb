"""Logits -> token: greedy, temperature, top-k, top-p. Pure functions; randomness comes in as a generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rheostat.errors import bad_setting


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw a token. The default is greedy."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Draw among the k most likely; 0 for no limit."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together reach this probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise bad_setting("temperature", self.temperature, "0 or more")
        if self.top_k < 0:
            raise bad_setting("top_k", self.top_k, "0 or more")
        if not 0 < self.top_p <= 1:
            raise bad_setting("top_p", self.top_p, "above 0 and at most 1")


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token a row from logits [B, V]. Returns [B] int64."""
    if sampling.temperature == 0:
        return most_likely(logits)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[:, 0]


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token [...] of logits [..., V]; the first of several alike.

    On a CPU not by torch, which would wake a thread for so many numbers: it then spins, on a core that the next step
    needs.
    """
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.float64):
        return logits.argmax(-1)
    return torch.from_numpy(np.asarray(logits.detach().numpy().argmax(-1)))


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution [B, V] that `sample` draws from, for a temperature above 0."""
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # at most 0: no overflow when cold
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scaled.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(scaled, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        scaled = scaled.masked_fill(drop, -torch.inf)
    return scaled.softmax(-1)
