"""Answers after a prompt, scored word by word: what a prompt's reader keeps of its details, with little noise.

A task's score asks whether all of an answer is right; the nats of the right answer say how far off it is. Both come
from one pass over the answer: `hit` is the share of answers all of whose tokens the model would have written itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rheostat.eval.tasks.find import find_tasks

Reader = Callable[[torch.Tensor], tuple[Any, Any, torch.Tensor]]
"""Prompt [1, N] -> the model that answers, its cache of all tokens but the last, and the mask of that cache [1, S]."""

MOST_TOKENS = 64
"""Of an answer."""


@dataclass(frozen=True)
class Item:
    """One prompt and its right answer."""

    prompt: torch.Tensor
    """[N]."""
    answer: torch.Tensor
    """[A]."""


def items(tokenizer: Any, task: str, folder: Path, limit: int, first: int = 0) -> list[Item]:
    """`limit` rows from `first` on of `lambada_openai`, or of a task whose rows have a prompt and a target."""
    found = []
    for row in find_tasks([task], folder)[task].dataset["test"].select(range(first, first + limit)):
        prompt, answer = row["text"].rsplit(" ", 1) if "text" in row and "prompt" not in row else _asked(row)
        gap = "" if prompt.endswith("\n") else " "
        ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
        right = tokenizer(gap + answer, add_special_tokens=False, return_tensors="pt").input_ids[0]
        found.append(Item(ids, right[:MOST_TOKENS]))
    return found


def _asked(row: dict[str, Any]) -> tuple[str, str]:
    return row["prompt"], row["target"]


@torch.no_grad()
def score(found: Sequence[Item], read: Reader) -> dict[str, float]:
    """`nats` of a right answer, `hit`, and the standard errors of both."""
    nats, hits = [], []
    for item in found:
        model, cache, mask = read(item.prompt[None])
        ids = torch.cat([item.prompt[-1:], item.answer[:-1]])[None]
        start = len(item.prompt) - 1
        out = model(
            input_ids=ids,
            attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
            position_ids=torch.arange(start, start + ids.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        )
        scores = out.logits[0].float().log_softmax(-1)
        nats.append(-float(scores.gather(1, item.answer[:, None]).sum()))
        hits.append(float((scores.argmax(-1) == item.answer).all()))
    return {"nats": _mean(nats), "nats_error": _error(nats), "hit": _mean(hits), "hit_error": _error(hits)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float]) -> float:
    return float(torch.tensor(values).std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
