"""The model as speculation uses it, on `transformers`: the reference for our own runtime's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from rheostat.caches.rewinding import check_rewindable, rewind, room
from rheostat.methods.base import Method, positions
from rheostat.sampling import most_likely
from rheostat.speculate.drafter import Draft, Host, State

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class StockHost(Host):
    """Passes of `transformers` through a method's touchpoints, on one of its caches."""

    cache: Cache

    def __init__(self, model: PreTrainedModel, method: Method, cache: Cache | None = None) -> None:
        """Nothing is read yet.

        Args:
            cache: an empty one; left out, the method's own.

        Raises:
            SettingError: the cache cannot be rewound.
        """
        self.model, self.method = model, method
        self.cache = method.make_cache(model) if cache is None else cache
        check_rewindable(self.cache)
        self.cache.activate_past_recording()

    def read(self, input_ids: torch.Tensor, mask: torch.Tensor, num_new: int) -> torch.Tensor:
        """Read the prompts."""
        logits = self.method.prefill(self.model, input_ids, mask, self.cache)
        self.cache.crop(0)  # layers with a window let go of what is outside it
        return logits

    def check(self, state: State, draft: Draft) -> torch.Tensor:
        """All rows together: shorter drafts are checked as far as the longest goes."""
        block = torch.cat([state.token_ids[:, -1:], draft.token_ids], 1)
        return self.method.verify(self.model, block, pad(state.mask, (0, block.shape[1] - 1), value=1), self.cache)

    def take_back(self, drops: list[int]) -> None:
        """Rewind, and align the rows on the right."""
        rewind(self.cache, drops)

    def room(self, num_rows: int) -> list[int]:
        """What the cache says."""
        return room(self.cache, num_rows)

    def stepper(self, state: State) -> Stepper:
        """One token a row."""
        return Stepper(self.model, self.cache, state.mask, positions(state.mask)[:, -1:])

    def forget(self, num_tokens: int) -> None:
        """Crop the cache."""
        self.cache.crop(-num_tokens)


def read(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Cache,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token's logits [B, V] after reading `token_ids` [B, T], of which `mask` [B, S] tells the padding."""
    if position_ids is None:
        position_ids = positions(mask)[:, -token_ids.shape[1] :]
    out = model(
        input_ids=token_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


class Stepper:
    """Reads a token a row into a cache and gives the next token's logits [B, V]; counts how many it has read."""

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: torch.Tensor, position_ids: torch.Tensor) -> None:
        self.model, self.cache, self.mask, self.position_ids = model, cache, mask, position_ids
        self.num_read = 0

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B] -> logits [B, V]."""
        if self.num_read:
            self.mask = pad(self.mask, (0, 1), value=1)
        logits = read(self.model, token_ids[:, None], self.mask, self.cache, self.position_ids + self.num_read)
        self.num_read += 1
        return logits

    def write(self, token_ids: torch.Tensor, number: int) -> torch.Tensor:
        """Token ids [B] -> the `number` most likely ones after them [B, n]."""
        found = []
        for _ in range(number):
            token_ids = most_likely(self(token_ids))
            found.append(token_ids)
        return torch.stack(found, 1)
