"""What a benchmark asks of a model, as tokens, in batches: requests that share a context meet in one batch, and
lengths within a batch are alike, so that little is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` after `context`? Token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Contexts to read together, and which requests follow each of them."""

    contexts: list[tuple[int, ...]]
    members: list[list[int]]
    """For each context, the numbers of the requests that share it."""


def truncated(request: Request, limit: int) -> Request:
    """The request with its context cut on the left, so that the model reads at most `limit` tokens.

    The last token of a continuation is predicted and not read. At least one token of context stays, which needs a
    continuation of at most `limit` tokens.
    """
    return Request(request.context[-(limit + 1 - len(request.continuation)) :], request.continuation)


def plan(requests: Sequence[Request], *, is_shared: bool, batch_tokens: int) -> list[Batch]:
    """Batches of requests, longest first, each of at most `batch_tokens` padded tokens (or one context, if that alone
    has more).

    Args:
        is_shared: requests with the same context share one reading of it. If not, only those do whose
            continuation is one token, which needs nothing but the logits after the context.
    """
    alone = {} if is_shared else {k: one for k, one in enumerate(requests) if len(one.continuation) > 1}
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        if number not in alone:
            groups.setdefault(request.context, []).append(number)
    # Apart, because a cache whose rows cannot be chosen has to keep all rows of its batch.
    kinds = [list(groups.items()), [(one.context, [number]) for number, one in alone.items()]]
    return [batch for kind in kinds for batch in _packed(kind, requests, batch_tokens)]


def _packed(
    groups: list[tuple[tuple[int, ...], list[int]]], requests: Sequence[Request], batch_tokens: int
) -> list[Batch]:
    def size(group: tuple[tuple[int, ...], list[int]]) -> tuple[int, int]:
        context, members = group
        return len(context), max(len(requests[number].continuation) for number in members)

    # By content last, so that the order does not depend on the order of the requests.
    ordered = sorted(groups, key=lambda group: (*(-length for length in size(group)), group[0]))
    batches: list[Batch] = []
    longest, num_rows = (0, 0), 0
    for group in ordered:
        context, members = group
        longest = (max(longest[0], size(group)[0]), max(longest[1], size(group)[1]))
        num_rows += len(members)
        full = batches and max((len(batches[-1].contexts) + 1) * longest[0], num_rows * longest[1]) > batch_tokens
        if not batches or full:
            batches.append(Batch([], []))
            longest, num_rows = size(group), len(members)
        batches[-1].contexts.append(context)
        batches[-1].members.append(members)
    return batches


def in_rows(prompts: Sequence[tuple[int, ...]], *, num_more: int, batch_tokens: int, max_rows: int) -> list[list[int]]:
    """Numbers of prompts to be answered together, longest first: at most `max_rows`, and at most `batch_tokens` padded
    tokens with `num_more` new ones for each row (or one prompt, if that alone has more)."""
    ordered = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), prompts[number], number))
    batches: list[list[int]] = []
    width = 0
    for number in ordered:
        if not batches or len(batches[-1]) >= max_rows or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = len(prompts[number]) + num_more
        batches[-1].append(number)
    return batches


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as [B, T], and their attention mask [B, T], with padding on the left."""
    return _padded(rows, device, lambda row, width: ([pad_id] * width + [*row], [0] * width + [1] * len(row)))


def right_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as [B, T], and their attention mask [B, T], with padding on the right."""
    return _padded(rows, device, lambda row, width: ([*row] + [pad_id] * width, [1] * len(row) + [0] * width))


def _padded(
    rows: Sequence[Sequence[int]],
    device: torch.device,
    pad: Callable[[Sequence[int], int], tuple[list[int], list[int]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    padded = [pad(row, length - len(row)) for row in rows]
    ids, mask = (torch.tensor([pair[k] for pair in padded], device=device) for k in (0, 1))
    return ids, mask


def can_choose_rows(cache: Cache) -> bool:
    """Whether rows of this cache can be repeated and dropped, as beam search does with `reorder_cache`.

    The classes of `transformers` can. A method's own class of cache or of layer must bring its own `reorder_cache`:
    the inherited one does not know what else the class holds.
    """
    home = "transformers.cache_utils"
    kinds: set[Any] = {type(cache), *map(type, cache.layers)}
    return all(kind.__module__ == home or kind.reorder_cache.__module__ != home for kind in kinds)
