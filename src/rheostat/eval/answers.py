"""Answers to a batch of prompts under the dial, through the method's own prefill and decode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from rheostat.adapted import Adapted
from rheostat.eval.batches import can_choose_rows, left_padded
from rheostat.sampling import Sampling, sample


@dataclass(frozen=True)
class Answer:
    """What was written after one prompt."""

    token_ids: tuple[int, ...]
    """The end token left out."""
    is_ended: bool
    """By an end token or by the caller's test, and not by the limit."""


def answer(
    adapted: Adapted,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    is_done: Callable[[Sequence[int]], bool],
    pad_id: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> list[Answer]:
    """Answer prompts together, under the enclosing `rheostat.spend`.

    A row that has ended leaves the batch where the cache allows it, so that it costs nothing further.

    Args:
        is_done: given a row's tokens so far, whether it has reached a stop string.
    """
    method, model = adapted.method, adapted.model
    ids, mask = left_padded(prompts, pad_id, adapted.device)  # [B, T]
    cache = method.make_cache(model)
    logits = method.prefill(model, ids, mask, cache)  # [B, V]
    can_leave = can_choose_rows(cache)
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    live = list(range(len(prompts)))
    for step in range(1, max_new_tokens + 1):
        drawn = sample(logits, sampling, generator)
        for row, token in zip(live, drawn.tolist(), strict=True):
            if ended[row]:
                continue
            if token not in end_ids:
                written[row].append(token)
            ended[row] = token in end_ids or is_done(written[row])
        left = [k for k, row in enumerate(live) if not ended[row]]
        if not left or step == max_new_tokens:
            break
        if can_leave and len(left) < len(live):
            kept = torch.tensor(left, device=adapted.device)
            adapted.choose_rows(cache, kept)
            mask, drawn, live = mask[kept], drawn[kept], [live[k] for k in left]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = method.decode(model, drawn[:, None], mask, cache)
    return [Answer(tuple(tokens), end) for tokens, end in zip(written, ended, strict=True)]
