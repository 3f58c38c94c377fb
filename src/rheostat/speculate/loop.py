"""The speculative loop: draft, check all drafted tokens in one pass, accept, rewind.

Greedy text is that of plain greedy decoding of the same model on the same cache, token for token; sampled text has
the same law. Rows of a batch accept different numbers of tokens and stay aligned on the right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import compress
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
    prompt_lengths: list[int]
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
    written = _Written([[] for _ in input_ids], mask.sum(1).tolist(), Geometry.from_config(model.config))
    first = sample(host.read(input_ids, mask, ending.max_new_tokens), sampling, generator)
    active = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    state = State(model, method, host, input_ids, mask, active, sampling, generator)
    state.token_ids, state.mask = _append(input_ids, first[:, None]), pad(mask, (0, 1), value=1)
    newest, everyone = [[token] for token in first.tolist()], [True] * len(first)
    result = _emit(state, written, ending, newest, [0] * len(first), everyone)
    yield result
    if not all(result.is_last.tolist()):
        drafter.begin(state)
    while not all(result.is_last.tolist()):
        result = _round(state, written, ending, drafter, pace)
        yield result


def _round(state: State, written: _Written, ending: Ending, drafter: Drafter, pace: Pace) -> Round:
    was_active = state.active.tolist()
    limits = _limits(state, written, ending, pace.length, was_active)
    pasts = [length + len(row) - 1 for length, row in zip(written.prompt_lengths, written.rows, strict=True)]
    begun = time.perf_counter()
    draft = (
        drafter.propose(state, torch.tensor(limits, device=state.token_ids.device)) if any(limits) else no_draft(state)
    )
    drafted = time.perf_counter()
    logits = _check(state, draft)
    token_ids, lengths = draft.token_ids.tolist(), draft.lengths.tolist()
    num_kept, following = _accept(state, draft, logits, token_ids, lengths, was_active)
    tried, right = (list(compress(one, was_active)) for one in (lengths, num_kept))
    pace.note(tried, right, drafted - begun, drafted)
    drops = _advance(state, token_ids, num_kept, following, was_active)
    new = _join(token_ids, num_kept, following)
    before = written.longest
    result = _emit(state, written, ending, new, lengths, was_active)
    _note(state.model.dtype.itemsize, written, result, was_active, pasts, written.longest - before, pace)
    if not all(result.is_last.tolist()):
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


def _limits(state: State, written: _Written, ending: Ending, draft_length: int, is_active: list[bool]) -> list[int]:
    """How many tokens [B] each row may draft: the pass gives one more of its own."""
    spaces = state.host.room(len(written.rows))
    left = [ending.max_new_tokens - len(row) - 1 for row in written.rows]
    return [
        max(0, min(draft_length, space, rest)) * active
        for space, rest, active in zip(spaces, left, is_active, strict=True)
    ]


def _check(state: State, draft: Draft) -> torch.Tensor:
    """The model's logits [B, G + 1, V] after the newest token and after each drafted one."""
    spending = current_spending()
    with in_phase("decode"), nullcontext() if spending is None else spending.meter.checking():
        return state.host.check(state, draft)


def _accept(
    state: State,
    draft: Draft,
    logits: torch.Tensor,
    token_ids: list[list[int]],
    lengths: list[int],
    is_active: list[bool],
) -> tuple[list[int], list[int]]:
    """How many drafted tokens [B] stay, none of rows that had ended, and the token after them [B]."""
    if state.is_greedy:
        counts = [n * active for n, active in zip(lengths, is_active, strict=True)]
        return accept_greedy(most_likely(logits).tolist(), token_ids, counts)
    laws = probabilities(logits.flatten(0, 1), state.sampling).view(logits.shape)
    found = accept_sampled(laws, draft.token_ids, draft.probs, draft.lengths * state.active, state.generator)
    return found[0].tolist(), found[1].tolist()


def _advance(
    state: State, token_ids: list[list[int]], num_kept: list[int], following: list[int], is_active: list[bool]
) -> list[int]:
    """Put what was accepted and what follows into the state, and take the rest back from the cache.

    Returns:
        How many of the round's tokens each row took back. Rows that had ended go along with the others.
    """
    width = len(token_ids[0])
    least = min(width - kept for kept, active in zip(num_kept, is_active, strict=True) if active)
    drops = [width - kept if active else least for kept, active in zip(num_kept, is_active, strict=True)]
    state.host.take_back(drops)
    shifts = [drop - least for drop in drops]
    rows = [
        [*drafted[: width - drop], token, *[0] * shift]
        for drafted, drop, token, shift in zip(token_ids, drops, following, shifts, strict=True)
    ]
    tokens = _append(state.token_ids, torch.tensor(rows, device=state.token_ids.device))
    mask = pad(state.mask, (0, len(rows[0])), value=1)
    if any(shifts):
        moved = torch.tensor(shifts, device=tokens.device)
        tokens, mask = roll_right(tokens, moved), roll_right(mask, moved)
    state.token_ids, state.mask = tokens, mask
    return drops


def _emit(
    state: State,
    written: _Written,
    ending: Ending,
    new: list[list[int]],
    num_drafted: list[int],
    is_active: list[bool],
) -> Round:
    """Cut the new tokens of each row at its end and hand them out."""
    out, device, goes_on = [], state.token_ids.device, list(is_active)
    for row, tokens in enumerate(new):
        kept: list[int] = []
        if is_active[row]:
            kept, has_ended = ending.cut(written.rows[row], tokens)
            written.rows[row] += kept
            goes_on[row] = not has_ended
        out.append(torch.tensor(kept, dtype=torch.long, device=device))
    state.active = torch.tensor(goes_on, device=device)
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
