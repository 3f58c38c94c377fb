"""Hooks on the host model: each pass is announced to the layers, and its attention, embedding and head are billed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from rheostat import families
from rheostat.cost import attention_cost, attention_weight_bytes, embedding_cost, ffn_cost, head_cost
from rheostat.geometry import Geometry
from rheostat.holding import Account, NewAccount, Parts, Reading, Step
from rheostat.methods.base import MeteredFFN
from rheostat.spending import Pass, current_pass, current_phase, current_spending, enter_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Settings = Callable[[str, int, torch.device], dict[str, torch.Tensor]]
"""From a phase, a number of rows B and a device: name of a dial -> native settings [B]."""

_kept_logits: ContextVar[Any] = ContextVar("kept_logits", default=0)
"""How many positions of the pass that begins give logits; 0 for all. Threads may share a model."""


class PassHooks:
    """Four hooks: one notes how many logits are wanted, one announces each pass of the decoder, two count what no layer
    of a method counts.

    Args:
        model: with its method attached, so that it is known which FFNs count for themselves.
        settings: what the layers are told to obey.
        new_account: what steers requests that are held.
    """

    def __init__(self, model: PreTrainedModel, geometry: Geometry, settings: Settings, new_account: NewAccount) -> None:
        self.model, self.geometry, self.settings, self.new_account = model, geometry, settings, new_account
        self._num_plain_ffns = sum(not isinstance(layer.mlp, MeteredFFN) for layer in families.layers(model))
        self._read: WeakKeyDictionary[Any, tuple[int, list[int]]] = WeakKeyDictionary()
        """Cache -> its length after the newest pass, and how many of each row's tokens are not padding: what the
        masks of caches of a fixed size do not tell."""
        self._accounts: WeakKeyDictionary[Any, Account] = WeakKeyDictionary()
        """Cache -> the account of the requests in it."""
        decoder, head = families.decoder(model), families.head(model)
        self._handles = [
            model.register_forward_pre_hook(self._note_logits, with_kwargs=True),
            decoder.register_forward_pre_hook(self._open_pass, with_kwargs=True),
            decoder.register_forward_hook(self._bill_decoder, with_kwargs=True),
            head.register_forward_hook(self._bill_head),
        ]

    @property
    def ids(self) -> frozenset[int]:
        """As `torch` numbers them."""
        return frozenset(handle.id for handle in self._handles)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return self.model.dtype.itemsize

    def share_account(self, cache: Any, copy: Any) -> None:
        """The requests in `copy` of a cache go on from what those in it have spent, each for itself."""
        if (account := self._accounts.get(cache)) is not None:
            self._accounts[copy] = account.copy()

    def choose_rows(self, cache: Any, rows: torch.Tensor) -> None:
        """Row b of the cache becomes what row `rows[b]` was, and so does what is known of the request in it."""
        cache.reorder_cache(rows)
        order = rows.tolist()
        if (account := self._accounts.get(cache)) is not None:
            self._accounts[cache] = account.choose(order)
        if (read := self._read.get(cache)) is not None:
            self._read[cache] = (read[0], [read[1][row] for row in order])

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _open_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from rheostat.caches.hierarchical import HierarchicalCache  # here, because it is built on transformers

        tokens = _new_tokens(args, kwargs)
        num_rows, num_tokens = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        phase = current_phase() or ("decode" if past and num_tokens == 1 else "prefill")
        mask = kwargs.get("attention_mask")
        mask = _plain_mask(mask, num_rows, num_tokens, past)
        valid, first = _marks(mask, num_rows, num_tokens, past, tokens.device)
        spending = current_spending()
        settings = self.settings(phase, num_rows, tokens.device)
        is_plain = phase == "decode" and (mask is None or bool((valid & ~first).all()))
        held = self._hold(phase, valid, cache, past, mask)
        enter_pass(Pass(phase, valid, first, settings, is_plain=is_plain, past=past, mask=mask, held=held))
        if isinstance(cache, HierarchicalCache) and not past and mask is not None:
            cache.mark_padding(mask)
        if spending is not None:
            full = self.geometry.ffn_size
            spending.meter.open_pass(phase, valid, self.geometry.num_layers, full)
            if isinstance(cache, HierarchicalCache):
                spending.meter.add("scores", 0, -cache.saved_bytes, 0, 0)
            if self._num_plain_ffns:
                spending.meter.widths(valid.long() * full * self._num_plain_ffns)

    def _note_logits(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _kept_logits.set(kwargs.get("logits_to_keep", 0))

    def _hold(
        self, phase: str, valid: torch.Tensor, cache: Any, past: int, mask: torch.Tensor | None
    ) -> Step | Reading | None:
        """What steers the pass that begins, where requests are held."""
        kept = _kept_logits.get()
        _kept_logits.set(0)
        spending, num_rows = current_spending(), len(valid)
        if spending is None or not spending.hold or (fresh := self.new_account(num_rows)) is None:
            return None
        account = self._accounts.get(cache) if past else None
        if account is None or len(account.rows) != num_rows:
            account = _begun(fresh, valid, past, mask)
        if cache is not None:
            self._accounts[cache] = account
        asked = spending.rows(phase, num_rows)
        counts = valid.cpu().numpy().astype(np.float64)
        if min(asked) == 1:
            account.skip(counts.sum(1).tolist())
            return None
        if valid.shape[1] == 1 and phase == "decode":
            return account.step(asked)
        if isinstance(kept, int) and kept == 1:  # a prompt
            return account.prompt(asked, Parts.of(counts > 0, _befores(num_rows, past, mask)))
        return account.text(asked, counts)

    def _bill_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        one, spending = current_pass(), current_spending()
        if spending is None or one is None:
            return
        itemsize = self.itemsize
        news = one.valid.sum(1).tolist()
        pasts = self._pasts(one, kwargs.get("past_key_values"), news)
        cost = attention_weight_bytes(self.geometry, itemsize)
        for (new, past), number in Counter(zip(news, pasts, strict=True)).items():
            cost += attention_cost(self.geometry, new, past, itemsize).times(number)
        if self._num_plain_ffns:
            cost += ffn_cost(self.geometry, sum(news), self._num_plain_ffns, itemsize)
        if _new_tokens(args, kwargs).dim() == 2:  # else embeddings were given, and nothing was looked up
            cost += embedding_cost(self.geometry, sum(news), itemsize)
        spending.meter.bill(cost)

    def _pasts(self, one: Pass, cache: Any, news: list[int]) -> list[int]:
        """How many tokens of each row, padding left out, came before this pass's `news`."""
        pasts = [one.past] * len(news)
        if one.mask is not None:
            pasts = one.mask[:, : one.past].sum(1).tolist()
        elif one.past:
            length, before = self._read.get(cache, (0, []))
            if length == one.past and len(before) == len(news):  # else it was cut or re-ordered since
                pasts = before
        if cache is not None:
            after = [past + new for past, new in zip(pasts, news, strict=True)]
            self._read[cache] = (one.past + one.valid.shape[1], after)
        return pasts

    def _bill_head(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        one, spending = current_pass(), current_spending()
        if spending is None or one is None:
            return
        num_logits = output.shape[:-1].numel()
        if output.shape[:-1] == one.valid.shape:
            num_logits = int(one.valid.sum())
        spending.meter.bill(head_cost(self.geometry, num_logits, self.itemsize))


def _new_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Of one pass: token ids [B, T], or embeddings [B, T, D] where those were given."""
    for name in ("input_ids", "inputs_embeds"):
        if (tokens := kwargs.get(name)) is not None:
            return tokens
    return args[0]


def _begun(account: Account, valid: torch.Tensor, past: int, mask: torch.Tensor | None) -> Account:
    """An account of rows with a past that nobody held."""
    account.skip(_befores(len(valid), past, mask))
    return account


def _befores(num_rows: int, past: int, mask: torch.Tensor | None) -> list[int]:
    """Tokens of each row in a cache of `past`, padding left out."""
    return [past] * num_rows if mask is None else mask[:, :past].sum(1).tolist()


def _plain_mask(mask: Any, num_rows: int, num_tokens: int, past: int) -> torch.Tensor | None:
    """The mask as one mark a token, [B, past + T], True where it is not padding; None where there is none to read.

    For caches of a fixed size `transformers` hands over what it makes of the user's mask: [B, 1, T, S] (booleans, or
    numbers to add to the scores), or one such for each kind of layer.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] < past + num_tokens:
        return None
    if mask.dim() == 2:
        return mask.bool() if mask.shape[1] == past + num_tokens else None
    if mask.dim() != 4 or mask.shape[2] != num_tokens:
        return None
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1  # [B, T, S]
    own = seen[:, :, past : past + num_tokens].diagonal(dim1=1, dim2=2)  # a token that is not padding sees itself
    return torch.cat([seen[:, -1, :past], own], 1).expand(num_rows, -1)


def _marks(
    mask: torch.Tensor | None, num_rows: int, num_tokens: int, past: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the new tokens [B, T] are not padding, and which are the first of their row."""
    valid = torch.ones(num_rows, num_tokens, dtype=torch.bool, device=device)
    first = torch.zeros_like(valid)
    if mask is not None:
        valid = mask[:, past:]
        first = (mask.long().cumsum(1)[:, past:] == 1) & valid
    elif past == 0 and num_tokens:
        first[:, 0] = True
    return valid, first
