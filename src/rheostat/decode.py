"""Generate token by token through a method's own touchpoints, with the bill of each token.

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
from rheostat.sampling import Sampling, sample


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
) -> Iterator[Step]:
    """Prefill the prompts [B, T] (left-padded) and yield one `Step` a token, until all rows ended or the limit
    is reached.

    Runs under the enclosing `rheostat.spend`. Rows that ended go on with their end token, so that shapes stay put.

    Raises:
        SettingError: an empty prompt, padding on the right, or `max_new_tokens` below 1.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise bad_setting("input_ids", tuple(input_ids.shape), "of shape [B, T] with at least one token")
    if max_new_tokens < 1:
        raise bad_setting("max_new_tokens", max_new_tokens, "1 or more")
    method, model = adapted.method, adapted.model
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or not bool(mask[:, -1].all()):
        allowed = f"{list(input_ids.shape)}, with padding on the left only"
        raise bad_setting("attention_mask", f"{list(mask.shape)}", allowed)
    cache = method.make_cache(model)
    started = time.perf_counter()
    logits = method.prefill(model, input_ids, mask, cache)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    ends = torch.tensor(eos_token_ids, device=input_ids.device)
    last = torch.zeros_like(ended, dtype=torch.long)
    for step in range(max_new_tokens):
        drawn = sample(logits, sampling or Sampling(), generator)
        last = torch.where(ended, last, drawn)
        ended = ended | torch.isin(last, ends)
        yield Step(last, time.perf_counter() - started, ended)
        if bool(ended.all()) or step == max_new_tokens - 1:
            return
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = method.decode(model, last[:, None], mask, cache)
