"""Which drafted tokens stay, and what follows them. Pure functions over a batch in which rows accept different numbers.

Shapes: B rows, G drafted tokens a row, V vocabulary. A row's draft may be shorter than G (`lengths`).
"""

from __future__ import annotations

import torch


def accept_greedy(
    target_ids: list[list[int]], draft_ids: list[list[int]], lengths: list[int]
) -> tuple[list[int], list[int]]:
    """Keep drafted tokens as long as they are what the model itself takes.

    Plain numbers: between two passes an operation of torch costs more than all that is done here.

    Args:
        target_ids: [B][G + 1], the model's most likely token at each position.
        draft_ids: [B][G].
        lengths: [B], how many of them each row drafted.

    Returns:
        How many are kept [B], and the model's own token after them [B].
    """
    num_kept = []
    for wanted, drafted, length in zip(target_ids, draft_ids, lengths, strict=True):
        n = 0
        while n < length and drafted[n] == wanted[n]:
            n += 1
        num_kept.append(n)
    return num_kept, [row[n] for row, n in zip(target_ids, num_kept, strict=True)]


def accept_sampled(
    target: torch.Tensor,
    draft_ids: torch.Tensor,
    draft: torch.Tensor | None,
    lengths: torch.Tensor,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep each drafted token x with probability min(1, p(x) / q(x)); what follows makes the law exactly p.

    After a rejection the next token comes from max(0, p - q), rescaled; after a draft that was kept whole, from p
    (arXiv 2211.17192, 2302.01318).

    Args:
        target: p, [B, G + 1, V], probabilities.
        draft_ids: [B, G].
        draft: q, [B, G, V], the probabilities that they were drawn from; None when they were not drawn: then q is 1 at
            the token.
        lengths: [B], how many of them each row drafted.

    Returns:
        How many are kept [B], and the token after them [B].
    """
    chosen = draft_ids[..., None]
    p = target[:, :-1].gather(2, chosen)[..., 0]  # [B, G]
    q = torch.ones_like(p) if draft is None else draft.gather(2, chosen)[..., 0]
    lots = torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype)
    num_kept = _leading(lots * q < p, lengths)
    return num_kept, _draw_next(target, draft_ids, draft, lengths, num_kept, generator)


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """max(0, p - q) [B, V], up to scale; p where the two are the same up to rounding."""
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > torch.finfo(p.dtype).eps, left, p)


def _leading(is_kept: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """How many tokens [B] of each row are kept before the first that is not, [B, G] -> [B]."""
    in_draft = torch.arange(is_kept.shape[1], device=is_kept.device) < lengths[:, None]
    return (is_kept & in_draft).long().cumprod(1).sum(1)


def _draw_next(
    target: torch.Tensor,
    draft_ids: torch.Tensor,
    draft: torch.Tensor | None,
    lengths: torch.Tensor,
    num_kept: torch.Tensor,
    generator: torch.Generator | None,
) -> torch.Tensor:
    rows = torch.arange(len(target), device=target.device)
    p = target[rows, num_kept]  # [B, V]
    if draft_ids.shape[1]:
        place = num_kept.clamp(max=draft_ids.shape[1] - 1)
        if draft is None:
            q = torch.zeros_like(p).scatter(1, draft_ids[rows, place][:, None], 1.0)
        else:
            q = draft[rows, place]
        p = torch.where((num_kept < lengths)[:, None], residual(p, q), p)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
