"""A second, smaller model drafts (arXiv 2211.17192, 2302.01318)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from rheostat.caches.rewinding import check_rewindable, rewind
from rheostat.cost import head_cost, rows_cost
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.base import Method
from rheostat.speculate.drafter import Draft, Drafter, State, Stopping
from rheostat.speculate.drafting import draft_token_by_token
from rheostat.speculate.stock import read
from rheostat.spending import current_spending

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class SecondModel(Drafter):
    """Keeps a cache of its own, which follows the rows of the first model: behind by a token or two, never ahead."""

    needs_cache = False

    def __init__(self, model: PreTrainedModel, stopping: Stopping | None = None) -> None:
        self.model, self.stopping = model, stopping or Stopping()
        self.geometry = Geometry.from_config(model.config)

    def begin(self, state: State) -> None:
        """Read the prompt."""
        vocab_sizes = [one.config.get_text_config(decoder=True).vocab_size for one in (state.model, self.model)]
        if vocab_sizes[0] != vocab_sizes[1]:
            raise bad_setting("drafter", f"a vocabulary of {vocab_sizes[1]}", f"of the model's, {vocab_sizes[0]}")
        self.cache: Cache = Method().make_cache(self.model)
        check_rewindable(self.cache)
        self.cache.activate_past_recording()
        self._read(state.token_ids[:, :-1], state.mask[:, :-1])
        self.cache.crop(0)
        self.num_behind = 1
        """Newest tokens of the state that its cache does not hold."""

    def propose(self, state: State, limits: torch.Tensor) -> Draft:
        """Token by token, after catching up with what was accepted."""
        mask = state.mask

        def step(newest: torch.Tensor) -> torch.Tensor:
            nonlocal mask
            is_first = mask is state.mask
            logits = self._read(state.token_ids[:, -self.num_behind :] if is_first else newest[:, None], mask)
            mask = pad(mask, (0, 1), value=1)
            return logits

        return draft_token_by_token(state, limits, self.stopping, step)

    def settle(self, state: State, num_drafted: int, drops: list[int]) -> None:
        """Take back what was rejected. After drafting the cache lacks the newest drafted token, so that a row which
        kept its whole draft would need it: then all rows stay behind by one more."""
        if not num_drafted:
            self.num_behind += 1
            return
        more = int(min(drops) == 0)
        rewind(self.cache, [drop - 1 + more for drop in drops])
        self.num_behind = 1 + more

    def _read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        spending = current_spending()
        if spending is not None:
            meter, itemsize, num_tokens = spending.meter, self.model.dtype.itemsize, token_ids.shape[1]
            valid = mask[:, -num_tokens:].bool()
            counts = zip(mask[:, :-num_tokens].sum(1).tolist(), valid.sum(1).tolist(), strict=True)
            with meter.charging("draft"):  # no hook of ours announces its passes
                meter.open_pass("decode", valid, 0, 0)
                meter.bill(rows_cost(self.geometry, counts, self.geometry.num_layers, itemsize))
                meter.bill(head_cost(self.geometry, len(token_ids), itemsize))
        return read(self.model, token_ids, mask, self.cache)


def check_tokenizers(ours: Any, theirs: Any) -> None:
    """Refuse a second model whose tokens mean something else.

    Raises:
        SettingError: with a token that differs.
    """
    mine, others = ours.get_vocab(), theirs.get_vocab()
    if mine == others:
        return
    token = min((t for t in mine.keys() | others.keys() if mine.get(t) != others.get(t)), key=repr)
    raise SettingError(
        f"drafter: must have the model's tokenizer; token {token!r} is {mine.get(token)} here and "
        f"{others.get(token)} there"
    )
