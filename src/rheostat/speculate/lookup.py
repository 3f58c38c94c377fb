"""Prompt lookup: what followed the same words earlier is likely to follow them again. No model drafts at all."""

from __future__ import annotations

import torch

from rheostat.errors import bad_setting
from rheostat.speculate.drafter import Draft, Drafter, State, no_draft


class PromptLookup(Drafter):
    """Copies from the row's own text: the continuation of the latest earlier place that ends in the same n tokens.

    The longest n that occurs wins (as published; the repository takes the first place, we take the latest, which is
    nearer in topic).
    """

    needs_cache = False

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise bad_setting("longest", longest, "1 or more")
        self.longest = longest

    def propose(self, state: State, limits: torch.Tensor) -> Draft:
        """At most `limits` [B] tokens; nothing for rows whose newest token is new."""
        found = []
        for tokens, mask, limit in zip(state.token_ids, state.mask, limits.tolist(), strict=True):
            found.append(look_up(tokens[mask.bool()], self.longest, limit))
        width = max(map(len, found))
        if not width:
            return no_draft(state)
        token_ids = torch.stack([torch.nn.functional.pad(one, (0, width - len(one))) for one in found])
        return Draft(token_ids, torch.tensor([len(one) for one in found], device=token_ids.device))


def look_up(token_ids: torch.Tensor, longest: int, limit: int) -> torch.Tensor:
    """At most `limit` tokens that followed the newest n of `token_ids` [S] before, n as large as possible."""
    for n in range(min(longest, len(token_ids) - 1), 0, -1):
        if limit < 1:
            break
        places = token_ids[:-1].unfold(0, n, 1)  # [S - n, n]: all that something follows
        starts = (places == token_ids[-n:]).all(1).nonzero()
        if len(starts):
            after = int(starts[-1]) + n
            return token_ids[after : after + limit]
    return token_ids[:0]
