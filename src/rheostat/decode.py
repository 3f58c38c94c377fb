"""Generate token by token, on our own runtime or through a method's own touchpoints, with the bill of each token.

For everything that `transformers` offers (beams, constraints, many samples) use `Adapted.generate`; this loop
is for streaming.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rheostat.adapted import Adapted
from rheostat.errors import bad_setting
from rheostat.runtime.batch import Batch, keys_and_values
from rheostat.runtime.building import Unsupported
from rheostat.runtime.choosing import refuse
from rheostat.runtime.engine import Runtime
from rheostat.sampling import Sampling, sample
from rheostat.spending import Spending, current_spending


@dataclass(frozen=True)
class Step:
    """One generated position, for all rows of the batch."""

    token_ids: torch.Tensor
    """[B]."""
    seconds: float
    """Since the stream began."""
    is_last: torch.Tensor
    """[B] bool: this row has ended (the end token is included once)."""


@torch.inference_mode()
def stream(
    adapted: Adapted,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_token_ids: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    runtime: str = "auto",
    weights: str = "auto",
) -> Iterator[Step]:
    """Prefill the prompts [B, T] (left-padded) and yield one `Step` a token, until all rows ended or the limit
    is reached.

    Runs under the enclosing `rheostat.spend`. Rows that ended go on with their end token, so that shapes stay put.

    Args:
        runtime: `auto`, `native` or `stock`, as for `Adapted.generate`.
        weights: what our own runtime holds the weights in, likewise.

    Raises:
        SettingError: an empty prompt, padding on the right, `max_new_tokens` below 1, or a runtime that cannot be had.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise bad_setting("input_ids", tuple(input_ids.shape), "of shape [B, T] with at least one token")
    if max_new_tokens < 1:
        raise bad_setting("max_new_tokens", max_new_tokens, "1 or more")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or not bool(mask[:, -1].all()):
        allowed = f"{list(input_ids.shape)}, with padding on the left only"
        raise bad_setting("attention_mask", f"{list(mask.shape)}", allowed)
    native = adapted.runtime(runtime, weights, with_forms=True)
    started = time.perf_counter()
    passes = (
        _Stock(adapted, input_ids, mask)
        if native is None
        else _start_native(adapted, native, input_ids, mask, max_new_tokens, runtime)
    )
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    ends = torch.tensor(eos_token_ids, device=input_ids.device)
    last = torch.zeros_like(ended, dtype=torch.long)
    for step in range(max_new_tokens):
        drawn = sample(passes.logits, sampling or Sampling(), generator)
        last = torch.where(ended, last, drawn)
        ended = ended | torch.isin(last, ends)
        yield Step(last, time.perf_counter() - started, ended)
        if bool(ended.all()) or step == max_new_tokens - 1:
            return
        passes.step(last)


class _Stock:
    """A batch on `transformers`, through the method's own touchpoints."""

    logits: torch.Tensor
    """[B, V], for the next token."""

    def __init__(self, adapted: Adapted, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.adapted, self.mask = adapted, mask
        self.cache = adapted.method.make_cache(adapted.model)
        self.logits = adapted.method.prefill(adapted.model, input_ids, mask, self.cache)

    def step(self, token_ids: torch.Tensor) -> None:
        """Read the newest token [B] of each row."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.logits = self.adapted.method.decode(self.adapted.model, token_ids[:, None], self.mask, self.cache)


class _Native:
    """A batch on our own runtime."""

    def __init__(self, adapted: Adapted, batch: Batch) -> None:
        self.adapted, self.batch = adapted, batch
        self.asked: Spending | None = None
        self.setting: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        """[B, V], for the next token."""
        return self.batch.logits

    def step(self, token_ids: torch.Tensor) -> None:
        """Read the newest token [B] of each row."""
        asked = current_spending()
        if asked is not self.asked:  # it may change from token to token, but mostly does not
            self.setting = self.batch.runtime.setting(self.adapted.settings("decode", len(token_ids)))
            self.asked = asked
        self.batch.step(token_ids, self.setting)
        self.batch.settle()


def _start_native(
    adapted: Adapted, runtime: Runtime, input_ids: torch.Tensor, mask: torch.Tensor, num_new: int, wanted: str
) -> _Stock | _Native:
    """A prompt read by our runtime; or by the method that acts at prefill, and then we go on from its cache."""
    if adapted.reads_prompts_on(runtime):
        settings, account = adapted.settings("prefill", len(input_ids)), adapted.account(len(input_ids))
        return _Native(adapted, Batch.read(runtime, input_ids, mask, settings, num_new=num_new, account=account))
    stock = _Stock(adapted, input_ids, mask)
    try:
        pairs = keys_and_values(stock.cache, input_ids.shape[1])
    except Unsupported as reason:
        refuse(wanted, reason)
        return stock
    return _Native(adapted, Batch.resume(runtime, pairs, mask, stock.logits, num_new=num_new))
