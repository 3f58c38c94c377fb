"""Drafting on a part of the cache: StreamingLLM and SnapKV, the policies that sparse self-speculation uses.

Baselines, as in MagicDec (arXiv 2408.11049): the same model drafts with its full weights, but reads only some of the
cached tokens. Each round drafts on a copy of the chosen columns, so that the model's cache is not touched; a fast
implementation would keep the copy. Keys were rotated when written, and drafted tokens have their true positions.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from rheostat.caches.rewinding import contents
from rheostat.errors import bad_setting
from rheostat.methods.base import positions
from rheostat.speculate.drafter import Draft, Drafter, State, Stopping
from rheostat.speculate.drafting import charging_draft, draft_token_by_token
from rheostat.speculate.stock import Stepper

OBSERVED = 32
"""Newest tokens of the prompt whose attention votes (SnapKV)."""

POOL_WIDTH = 5
"""Votes are averaged over so many neighbours (SnapKV)."""


class SparseDrafter(Drafter):
    """Reads a share of the context."""

    def __init__(self, share: float = 0.25, stopping: Stopping | None = None) -> None:
        if not 0 < share <= 1:
            raise bad_setting("share", share, "above 0 and at most 1")
        self.share, self.stopping = share, stopping or Stopping()

    def budget(self, state: State) -> int:
        """Columns that are read; no more than the shortest row has tokens, so that none of them is padding."""
        lengths = state.mask[:, :-1].sum(1)
        return max(1, min(int(lengths.min()), round(self.share * int(lengths.max()))))

    @abstractmethod
    def choose(self, state: State, layer: int, num_heads: int, budget: int) -> torch.Tensor:
        """Which columns of the cache [B, K, budget] to read."""

    def propose(self, state: State, limits: torch.Tensor) -> Draft:
        """Token by token on a copy of the chosen columns."""
        budget = self.budget(state)
        cache = DynamicCache()
        for i, layer in enumerate(cache_of(state).layers):
            refuse_windows(layer, self)
            keys, values = contents(layer)
            index = self.choose(state, i, keys.shape[1], budget)[..., None]
            cache.update(
                keys.gather(2, index.expand(-1, -1, -1, keys.shape[3])),
                values.gather(2, index.expand(-1, -1, -1, values.shape[3])),
                i,
            )
        seen = torch.ones(len(limits), budget + 1, dtype=state.mask.dtype, device=limits.device)
        step = Stepper(state.model, cache, seen, positions(state.mask)[:, -1:])
        with charging_draft():
            return draft_token_by_token(state, limits, self.stopping, step)


class StreamingLLM(SparseDrafter):
    """Reads each row's first tokens (the attention sinks) and its newest ones (arXiv 2309.17453)."""

    def __init__(self, share: float = 0.25, num_sinks: int = 4, stopping: Stopping | None = None) -> None:
        super().__init__(share, stopping)
        if num_sinks < 0:
            raise bad_setting("num_sinks", num_sinks, "0 or more")
        self.num_sinks = num_sinks

    def choose(self, state: State, layer: int, num_heads: int, budget: int) -> torch.Tensor:
        """The same columns for all heads and layers."""
        num_sinks = min(self.num_sinks, budget)
        device = state.mask.device
        first = _num_padding(state.mask)[:, None] + torch.arange(num_sinks, device=device)
        stop = state.mask.shape[1] - 1  # columns of the cache
        newest = torch.arange(stop - (budget - num_sinks), stop, device=device).expand(len(first), -1)
        return torch.cat([first, newest], 1)[:, None].expand(-1, num_heads, -1)


class SnapKV(SparseDrafter):
    """Reads what the prompt's last tokens attended to, by head, and all that came after (arXiv 2404.14469).

    The votes cost one more pass over the last tokens of the prompt.
    """

    def begin(self, state: State) -> None:
        """Let the prompt's last tokens vote: run them again, this time looking at the attention."""
        mask = state.mask[:, :-1]  # of the cache
        num_observed = min(OBSERVED, int(mask.sum(1).min()) - 1)
        self.num_padding = _num_padding(mask)
        self.votes: list[torch.Tensor] = []
        """Of each layer, for each column before the observed ones [B, K, S]; none for a prompt of one token."""
        if num_observed < 1:
            return
        before = mask[:, :-num_observed].bool()
        cache, observed = DynamicCache(), state.token_ids[:, -1 - num_observed : -1]
        for i, layer in enumerate(cache_of(state).layers):
            refuse_windows(layer, self)
            keys, values = contents(layer)
            cache.update(keys[:, :, :-num_observed], values[:, :, :-num_observed], i)
        with charging_draft():
            weights = attention_of(state.model, observed, mask, cache)
        for one, layer in zip(weights, cache_of(state).layers, strict=True):
            self.votes.append(count_votes(one, contents(layer)[0].shape[1], before))

    def choose(self, state: State, layer: int, num_heads: int, budget: int) -> torch.Tensor:
        """The most voted columns of the prompt and all the newer ones, as far as the budget goes."""
        num_columns = state.mask.shape[1] - 1
        num_voted = self.votes[layer].shape[2] if self.votes else 0
        num_newest = min(budget, num_columns - num_voted)
        newest = torch.arange(num_columns - num_newest, num_columns, device=state.mask.device)
        newest = newest.expand(len(state.mask), num_heads, -1)
        if num_newest == budget:
            return newest
        shift = _num_padding(state.mask) - self.num_padding  # rows have moved to the right since the vote
        voted = self.votes[layer].topk(budget - num_newest, dim=-1).indices + shift[:, None, None]
        return torch.cat([voted, newest], 2)


def attention_of(
    model: PreTrainedModel, token_ids: torch.Tensor, mask: torch.Tensor, cache: Cache
) -> tuple[torch.Tensor, ...]:
    """Attention weights [B, H, T, S] of each layer for the tokens [B, T] after `cache`.

    Only eager attention gives them, so the model is switched to it for the time: no other thread may use it meanwhile.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        position_ids = positions(mask)[:, -token_ids.shape[1] :]
        out = model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
            logits_to_keep=1,
        )
    finally:
        model.set_attn_implementation(before)
    return out.attentions


def count_votes(weights: torch.Tensor, num_kv_heads: int, before: torch.Tensor) -> torch.Tensor:
    """Votes [B, K, S] from attention weights [B, H, T, S + T]: summed over the T observers and the heads that share a
    key head, smoothed over neighbours. `before` [B, S] is False for padding, which gets none."""
    votes = weights[..., : before.shape[1]].sum(2)  # [B, H, S]
    votes = votes.unflatten(1, (num_kv_heads, -1)).sum(2)  # [B, K, S]
    votes = torch.nn.functional.avg_pool1d(votes, POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2)
    return votes.masked_fill(~before[:, None], -torch.inf)


def cache_of(state: State) -> Cache:
    """The cache to choose from; our own runtime, which has none of `transformers`, does not run these drafters."""
    assert state.cache is not None
    return state.cache


def refuse_windows(layer: CacheLayerMixin, drafter: Drafter) -> None:
    """Columns cannot be chosen from a layer that has let go of some.

    Raises:
        SettingError: `layer` attends to a window.
    """
    if isinstance(layer, DynamicSlidingWindowLayer):
        name = type(drafter).__name__
        raise bad_setting("drafter", name, "another one: this model has layers that attend to a window only")


def _num_padding(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(1) == 0).sum(1)
