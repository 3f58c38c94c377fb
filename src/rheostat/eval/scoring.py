"""Log-likelihoods of given continuations under the dial, through the method's own touchpoints.

The stock harness runs one forward pass over context and continuation: what a method does to the prompt, the cache
or the steps of decoding never shows in its scores. Here the context is read as it is when the model answers, by
`Method.prefill` into the method's own cache, and the continuation is scored from that cache. Contexts that several
continuations share, as in multiple choice, are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rheostat.adapted import Adapted
from rheostat.eval.batches import Batch, Request, can_choose_rows, left_padded, right_padded
from rheostat.methods.base import Method, positions
from rheostat.methods.chain import Chain

if TYPE_CHECKING:
    from transformers import Cache

SLICE = 1024
"""Positions whose logits [V] are normalised at once: the copies are as large as the logits."""


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    log_likelihood: float
    """Natural logarithm, summed over tokens."""
    is_greedy: bool
    """Each token is the most likely one."""


def scores_by_step(method: Method) -> bool:
    """Whether continuations must be fed token by token to show what the method does.

    That is so where it changes the steps of decoding; else one pass over the whole continuation computes the same.
    """
    members = method.methods if isinstance(method, Chain) else (method,)
    return any(type(one).decode is not Method.decode or "depth" in one.stages for one in members)


def score(adapted: Adapted, requests: Sequence[Request], batch: Batch, pad_id: int) -> dict[int, Score]:
    """Prefill the contexts of a batch and score its requests from the cache, under the enclosing `rheostat.spend`.

    Returns:
        Number of the request -> its score.
    """
    method, model = adapted.method, adapted.model
    ids, mask = left_padded(batch.contexts, pad_id, adapted.device)  # [G, T]
    cache = method.make_cache(model)
    logits = method.prefill(model, ids, mask, cache)  # [G, V]
    numbers = [number for members in batch.members for number in members]  # R requests
    group = torch.tensor([g for g, members in enumerate(batch.members) for _ in members], device=adapted.device)
    continuations = [requests[number].continuation for number in numbers]
    tally = _Tally(len(numbers))
    firsts = torch.tensor([one[0] for one in continuations], device=adapted.device)
    tally.add(range(len(numbers)), *_judged(logits, group, firsts))
    longer = [row for row, one in enumerate(continuations) if len(one) > 1]
    if longer:
        groups = group[longer]
        if groups.tolist() != list(range(len(ids))):
            adapted.choose_rows(cache, groups)
        follow = _follow_by_step if scores_by_step(method) else _follow_at_once
        follow(adapted, [continuations[row] for row in longer], mask[groups], cache, longer, tally, pad_id)
    return dict(zip(numbers, tally.scores(), strict=True))


def score_forward(adapted: Adapted, requests: Sequence[Request], batch: Batch, pad_id: int) -> dict[int, Score]:
    """The same in one forward pass over context and continuation, for text that is no answer to a prompt."""
    numbers = [number for members in batch.members for number in members]
    rows = [(*requests[number].context, *requests[number].continuation) for number in numbers]
    ids, mask = right_padded([row[:-1] for row in rows], pad_id, adapted.device)
    logits = adapted.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [R, T, V]
    tally = _Tally(len(numbers))
    for row, number in enumerate(numbers):
        request = requests[number]
        start = len(request.context) - 1
        targets = torch.tensor(request.continuation, device=adapted.device)
        own = logits[row, start : start + len(targets)]
        tally.add([row] * len(targets), *_judged(own, torch.arange(len(targets)), targets))
    return dict(zip(numbers, tally.scores(), strict=True))


class _Tally:
    """Sums over the tokens of each row."""

    def __init__(self, num_rows: int) -> None:
        self.sums = [0.0] * num_rows
        self.greedy = [True] * num_rows

    def add(self, rows: Sequence[int], logs: torch.Tensor, hits: torch.Tensor) -> None:
        """Log-probabilities and hits [N] of tokens that belong to `rows`."""
        for row, log, hit in zip(rows, logs.tolist(), hits.tolist(), strict=True):
            self.sums[row] += log
            self.greedy[row] &= hit

    def scores(self) -> list[Score]:
        return [Score(*pair) for pair in zip(self.sums, self.greedy, strict=True)]


def _judged(logits: torch.Tensor, at: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N] of the tokens `targets` [N] at the positions `at` [N] of logits [P, V], and whether each is
    the most likely."""
    at = at.to(logits.device)
    pairs = [(part.float().logsumexp(-1), part.argmax(-1)) for part in logits.split(SLICE)]
    norms, best = (torch.cat(column) for column in zip(*pairs, strict=True))
    return logits[at, targets].float() - norms[at], best[at] == targets


def _follow_at_once(
    adapted: Adapted,
    continuations: Sequence[tuple[int, ...]],
    mask: torch.Tensor,
    cache: Cache,
    rows: Sequence[int],
    tally: _Tally,
    pad_id: int,
) -> None:
    """One pass over all but the last token of each continuation, after the cache."""
    ids, own = right_padded([one[:-1] for one in continuations], pad_id, adapted.device)  # [R, T]
    full = torch.cat([mask, own], 1)
    logits = adapted.model(
        input_ids=ids,
        attention_mask=full,
        position_ids=positions(full)[:, -ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).logits
    at = own.flatten().nonzero()[:, 0]  # the positions that are not padding, row by row
    targets = torch.tensor([token for one in continuations for token in one[1:]], device=adapted.device)
    owners = [row for row, one in zip(rows, continuations, strict=True) for _ in one[1:]]
    tally.add(owners, *_judged(logits.flatten(0, 1), at, targets))


def _follow_by_step(
    adapted: Adapted,
    continuations: Sequence[tuple[int, ...]],
    mask: torch.Tensor,
    cache: Cache,
    rows: Sequence[int],
    tally: _Tally,
    pad_id: int,
) -> None:
    """Token by token through `Method.decode`. Rows that are through leave the batch where the cache allows it, and
    else go on with padding that nobody looks at."""
    method, model = adapted.method, adapted.model
    can_leave = can_choose_rows(cache)
    live = list(range(len(rows)))
    for step in range(1, max(map(len, continuations))):
        due = [k for k, row in enumerate(live) if len(continuations[row]) > step]
        if can_leave and len(due) < len(live):
            kept = torch.tensor(due, device=adapted.device)
            adapted.choose_rows(cache, kept)
            mask, live = mask[kept], [live[k] for k in due]
            due = list(range(len(live)))
        fed = [continuations[row][step - 1] if k in set(due) else pad_id for k, row in enumerate(live)]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = method.decode(model, torch.tensor(fed, device=adapted.device)[:, None], mask, cache)
        targets = torch.tensor([continuations[live[k]][step] for k in due], device=adapted.device)
        tally.add([rows[live[k]] for k in due], *_judged(logits, torch.tensor(due), targets))
