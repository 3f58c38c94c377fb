"""Drafters that are the model itself, read more cheaply."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from rheostat.errors import bad_setting
from rheostat.sampling import most_likely, probabilities
from rheostat.speculate.drafter import Draft, Drafter, State, Step, Stopping, no_draft
from rheostat.spending import current_spending, spend


def charging_draft() -> AbstractContextManager[None]:
    """Passes inside are billed as drafting, where there is a meter."""
    spending = current_spending()
    return nullcontext() if spending is None else spending.meter.charging("draft")


def draw(
    logits: torch.Tensor, state: State, *, wants_chance: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Draw a drafted token a row from logits [B, V].

    Returns:
        The tokens [B], what they were drawn from [B, V] (None when greedy), and each token's own probability [B]
        (ones where nobody wants it).
    """
    if state.is_greedy:
        best = most_likely(logits)
        if not wants_chance:
            return best, None, torch.ones(len(best), device=best.device)
        return best, None, logits.softmax(-1).gather(1, best[:, None])[:, 0]
    probs = probabilities(logits, state.sampling)
    token_ids = torch.multinomial(probs, 1, generator=state.generator)[:, 0]
    return token_ids, probs, probs.gather(1, token_ids[:, None])[:, 0]


def draft_token_by_token(
    state: State, limits: torch.Tensor, stopping: Stopping, step: Callable[[torch.Tensor], torch.Tensor]
) -> Draft:
    """Draft one token after another with `step`, until every row reached its limit or its risk.

    Args:
        step: reads a token a row [B] and gives the next one's logits [B, V].
    """
    newest, chances = state.token_ids[:, -1], torch.ones(len(limits), device=limits.device)
    lengths = torch.zeros_like(limits)
    going = limits > 0
    token_ids, probs = [], []
    while bool(going.any()):
        newest, law, chance = draw(step(newest), state, wants_chance=stopping.risk < 1)
        token_ids.append(newest)
        probs.append(law)
        lengths = lengths + going
        chances = chances * chance
        going = going & (lengths < limits) & (1 - chances <= stopping.risk)
    if not token_ids:
        return no_draft(state)
    laws = [law for law in probs if law is not None]
    return Draft(torch.stack(token_ids, 1), lengths, torch.stack(laws, 1) if laws else None)


def draft_at_once(state: State, limits: torch.Tensor, step: Step) -> Draft:
    """The most likely tokens one after another, until every row reached its limit."""
    most = int(limits.max())
    return Draft(step.write(state.token_ids[:, -1], most), limits) if most else no_draft(state)


class SelfDrafter(Drafter):
    """The model drafts for itself, on its own cache, under a cheaper reading; then it forgets what it drafted."""

    needs_cache = False

    def __init__(self, stopping: Stopping | None = None) -> None:
        self.stopping = stopping or Stopping()

    def reading(self, state: State) -> AbstractContextManager[object]:
        """What makes the model cheaper while it drafts. Here nothing: the draft is always right, and saves nothing."""
        return nullcontext()

    def propose(self, state: State, limits: torch.Tensor) -> Draft:
        """Token by token on the model's own cache; the keys and values that drafting wrote are taken back."""
        with ExitStack() as stack:
            stack.enter_context(charging_draft())
            stack.enter_context(self.reading(state))
            step = state.host.stepper(state)
            if state.is_greedy and self.stopping.risk == 1:  # nothing is looked at between two tokens
                draft = draft_at_once(state, limits, step)
            else:
                draft = draft_token_by_token(state, limits, self.stopping, step)
            state.host.forget(step.num_read)
        return draft


class LowDial(SelfDrafter):
    """The model at a low setting of its dial drafts, at the asked setting it checks: lossless, and no second model."""

    def __init__(self, compute: float, stopping: Stopping | None = None) -> None:
        super().__init__(stopping)
        if not 0 < compute <= 1:
            raise bad_setting("draft_compute", compute, "a number in (0, 1]")
        self.compute = compute

    def reading(self, state: State) -> AbstractContextManager[object]:
        """At the low setting, on the meter of the caller."""
        spending = current_spending()
        return spend(self.compute, meter=None if spending is None else spending.meter)
