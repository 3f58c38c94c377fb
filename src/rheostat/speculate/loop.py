"""The speculative loop: draft, check all drafted tokens in one pass, accept, rewind.

Greedy text is that of plain greedy decoding of the same model on the same cache, token for token; sampled text has
the same law. Rows of a batch accept different numbers of tokens and stay aligned on the right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from rheostat.caches.rewinding import roll_right
from rheostat.cost import rows_decode_cost
from rheostat.errors import bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.base import Method
from rheostat.sampling import Sampling, most_likely, probabilities, sample
from rheostat.speculate.accepting import accept_greedy, accept_sampled
from rheostat.speculate.drafter import Draft, Drafter, Host, State, no_draft
from rheostat.speculate.pacing import Pace
from rheostat.speculate.stock import StockHost
from rheostat.spending import current_spending, in_phase

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Round:
    """What one pass of the model gave."""

    token_ids: list[torch.Tensor]
    """For each row its new tokens, in order; none for rows that had ended."""
    is_last: torch.Tensor
    """[B] bool: this row has ended."""
    num_drafted: list[int]
    """Tokens drafted for each row; of these the row's new tokens but the last were accepted."""
    seconds: float
    """Since generation began."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """When a row ends."""

    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None
    """Token ids -> text; needed for stop strings."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise bad_setting("max_new_tokens", self.max_new_tokens, "1 or more")
        if self.stop_strings and self.decode is None:
            raise bad_setting("stop_strings", self.stop_strings, "given together with the tokenizer")

    def cut(self, before: Sequence[int], new: Sequence[int]) -> tuple[list[int], bool]:
        """Of the `new` tokens after `before` those up to the end, and whether it has come."""
        new = list(new)[: self.max_new_tokens - len(before)]
        for i, token in enumerate(new):
            if token in self.eos_token_ids or len(before) + i + 1 == self.max_new_tokens:
                return self._cut_at_string(before, new[: i + 1], True)
        return self._cut_at_string(before, new, False)

    def _cut_at_string(self, before: Sequence[int], new: list[int], has_ended: bool) -> tuple[list[int], bool]:
        if self.decode is None or not self.stop_strings:
            return new, has_ended
        for i in range(len(new)):
            text = self.decode([*before, *new[: i + 1]])
            if any(stop in text for stop in self.stop_strings):
                return new[: i + 1], True
        return new, has_ended


@dataclass
class _Written:
    """What each row has written."""

    rows: list[list[int]]
    geometry: Geometry
    started: float = field(default_factory=time.perf_counter)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


@torch.inference_mode()
def speculate(
    model: PreTrainedModel,
    method: Method,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    drafter: Drafter,
    draft_length: int | str = 5,
    ending: Ending | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    cache: Cache | None = None,
    host: Host | None = None,
) -> Iterator[Round]:
    """Write after the prompts [B, T] (left-padded), a `Round` at a time, until all rows ended.

    Runs under the enclosing `rheostat.spend`: checking a draft is decoding, and obeys its `decode` setting.

    Args:
        drafter: guesses; the text (greedy) or its law (sampled) does not depend on it.
        draft_length: tokens that it may guess a round, at most; `auto` takes what pays, by the times measured while
            it runs, and drafts nothing where nothing pays.
        cache: an empty one of `transformers`; left out, the method's own.
        host: what runs the model; left out, `transformers` does, on `cache`.

    Raises:
        SettingError: an input cannot be used, the draft length is out of range, or the cache cannot be rewound.
    """
    pace = Pace.of(draft_length)
    mask = check_prompts(input_ids, attention_mask)
    ending, sampling = ending or Ending(), sampling or Sampling()
    host = host or StockHost(model, method, cache)
    written = _Written([[] for _ in input_ids], Geometry.from_config(model.config))
    first = sample(host.read(input_ids, mask, ending.max_new_tokens), sampling, generator)
    active = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    state = State(model, method, host, input_ids, mask, active, sampling, generator)
    state.token_ids, state.mask = _append(input_ids, first[:, None]), pad(mask, (0, 1), value=1)
    yield _emit(state, written, ending, [[token] for token in first.tolist()], [0] * len(first))
    if bool(state.active.any()):
        drafter.begin(state)
    while bool(state.active.any()):
        yield _round(state, written, ending, drafter, pace)


def _round(state: State, written: _Written, ending: Ending, drafter: Drafter, pace: Pace) -> Round:
    limits = _limits(state, written, ending, pace.length)
    pasts = (state.mask.sum(1) - 1).tolist() if current_spending() is not None else []
    begun = time.perf_counter()
    draft = drafter.propose(state, limits) if bool(limits.any()) else no_draft(state)
    drafted = time.perf_counter()
    logits = _check(state, draft)
    num_kept, following = _accept(state, draft, logits)
    pace.note(draft.lengths[state.active].tolist(), num_kept[state.active].tolist(), drafted - begun, drafted)
    drops = _advance(state, draft, num_kept, following)
    new = _join(draft.token_ids.tolist(), num_kept.tolist(), following.tolist())
    was_active, before = state.active.tolist(), written.longest
    result = _emit(state, written, ending, new, draft.lengths.tolist())
    _note(state.model.dtype.itemsize, written, result, was_active, pasts, written.longest - before, pace)
    if bool(state.active.any()):
        drafter.settle(state, draft.token_ids.shape[1], drops)
    return result


def check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mask [B, T] of prompts, all ones where none is given.

    Raises:
        SettingError: an empty prompt, or padding on the right.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise bad_setting("input_ids", tuple(input_ids.shape), "of shape [B, T] with at least one token")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or not bool(mask[:, -1].all()):
        allowed = f"{list(input_ids.shape)}, with padding on the left only"
        raise bad_setting("attention_mask", f"{list(mask.shape)}", allowed)
    return mask


# -- one round


def _limits(state: State, written: _Written, ending: Ending, draft_length: int) -> torch.Tensor:
    """How many tokens [B] each row may draft: the pass gives one more of its own."""
    spaces = state.host.room(len(written.rows))
    left = [ending.max_new_tokens - len(row) - 1 for row in written.rows]
    limits = [max(0, min(draft_length, *pair)) for pair in zip(spaces, left, strict=True)]
    return torch.tensor(limits, device=state.token_ids.device) * state.active


def _check(state: State, draft: Draft) -> torch.Tensor:
    """The model's logits [B, G + 1, V] after the newest token and after each drafted one."""
    spending = current_spending()
    with in_phase("decode"), nullcontext() if spending is None else spending.meter.checking():
        return state.host.check(state, draft)


def _accept(state: State, draft: Draft, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = draft.lengths * state.active
    if state.is_greedy:
        return accept_greedy(most_likely(logits), draft.token_ids, lengths)
    laws = probabilities(logits.flatten(0, 1), state.sampling).view(logits.shape)
    return accept_sampled(laws, draft.token_ids, draft.probs, lengths, state.generator)


def _advance(state: State, draft: Draft, num_kept: torch.Tensor, following: torch.Tensor) -> list[int]:
    """Put what was accepted and what follows into the state, and take the rest back from the cache.

    Returns:
        How many of the round's tokens each row took back. Rows that had ended go along with the others.
    """
    width = draft.token_ids.shape[1]
    least = int((width - num_kept)[state.active].min())
    drops = torch.where(state.active, width - num_kept, least)
    state.host.take_back(drops.tolist())
    tokens = _append(_append(state.token_ids, draft.token_ids), following[:, None])
    last = tokens.shape[1] - 1 - drops
    tokens = tokens.scatter(1, last[:, None], following[:, None])
    mask = pad(state.mask, (0, width + 1), value=1)
    if int(drops.max()) > least:
        tokens, mask = roll_right(tokens, drops), roll_right(mask, drops)
        state.token_ids, state.mask = tokens[:, least:], mask[:, least:]
    else:  # nothing comes in on the left: cut on the right
        state.token_ids, state.mask = (one[:, : one.shape[1] - least] for one in (tokens, mask))
    return drops.tolist()


def _emit(state: State, written: _Written, ending: Ending, new: list[list[int]], num_drafted: list[int]) -> Round:
    """Cut the new tokens of each row at its end and hand them out."""
    out, device = [], state.token_ids.device
    is_active = state.active.tolist()
    for row, tokens in enumerate(new):
        kept: list[int] = []
        if is_active[row]:
            kept, has_ended = ending.cut(written.rows[row], tokens)
            written.rows[row] += kept
            is_active[row] = not has_ended
        out.append(torch.tensor(kept, dtype=torch.long, device=device))
    state.active = torch.tensor(is_active, device=device)
    return Round(out, ~state.active, num_drafted, time.perf_counter() - written.started)


def _note(
    itemsize: int,
    written: _Written,
    result: Round,
    was_active: list[bool],
    pasts: list[int],
    num_steps: int,
    pace: Pace,
) -> None:
    """Tell the meter what came of a round that began with `pasts` tokens a row in the cache."""
    spending = current_spending()
    if spending is None:
        return
    rows = [row for row, active in enumerate(was_active) if active]
    news = [len(result.token_ids[row]) for row in rows]
    for row, new in zip(rows, news, strict=True):
        spending.meter.speculation.add(result.num_drafted[row], new - 1)
    dense = rows_decode_cost(
        written.geometry,
        news=news,
        pasts=[pasts[row] for row in rows],
        num_steps=num_steps,
        itemsize=itemsize,
    )
    spending.meter.owe(dense, sum(news))
    spending.meter.speculation.verdict = pace.verdict


def _append(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([left, right.to(left.dtype)], 1)


def _join(drafts: list[list[int]], num_kept: list[int], following: list[int]) -> list[list[int]]:
    return [[*draft[:n], token] for draft, n, token in zip(drafts, num_kept, following, strict=True)]
