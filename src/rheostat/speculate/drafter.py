"""What a drafter is: whoever guesses tokens for the model to check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from rheostat.errors import bad_setting
from rheostat.sampling import Sampling

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LONGEST_DRAFT = 64
"""Tokens; one more only delays the answer, whatever drafts them."""


class Step(Protocol):
    """Reads a token a row and gives the next one's logits; counts how many it has read."""

    num_read: int

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B] -> logits [B, V]."""

    def write(self, token_ids: torch.Tensor, number: int) -> torch.Tensor:
        """Token ids [B] -> the `number` most likely ones after them [B, n], of which the last is not read."""


class Host(ABC):
    """The model and its cache, as one generation uses them: on `transformers`, or on our own runtime."""

    cache: Cache | None = None
    """Of `transformers`; None on our own runtime."""

    @abstractmethod
    def read(self, input_ids: torch.Tensor, mask: torch.Tensor, num_new: int) -> torch.Tensor:
        """Read the prompts [B, T], after which at most `num_new` tokens will be written. Next token's logits [B, V]."""

    @abstractmethod
    def check(self, state: State, draft: Draft) -> torch.Tensor:
        """Read the newest token and the draft. Logits [B, G + 1, V] after each; beyond a row's draft they mean
        nothing."""

    @abstractmethod
    def take_back(self, drops: list[int]) -> None:
        """Of the G + 1 tokens of the last check, forget the last `drops[b]` of row b; the rest stays for good."""

    @abstractmethod
    def room(self, num_rows: int) -> list[int]:
        """How many tokens of each row a check may take after the newest one and read what plain decoding reads."""

    @abstractmethod
    def stepper(self, state: State) -> Step:
        """The model itself as a draft, one token a row at a time, on its own cache."""

    @abstractmethod
    def forget(self, num_tokens: int) -> None:
        """Forget as many tokens of every row, which a `stepper` read."""

    def cheaply(self) -> AbstractContextManager[object]:
        """Inside, the model reads what its method's draft reads. Here: the drafter sees to that itself."""
        return nullcontext()


@dataclass
class State:
    """Where one generation stands. The cache holds all tokens but the newest of each row."""

    model: PreTrainedModel
    method: Any
    """The `Method` that runs it: methods know drafters, so this module does not know them."""
    host: Host
    token_ids: torch.Tensor
    """[B, S], rows aligned on the right."""
    mask: torch.Tensor
    """[B, S], 0 where a row has no token."""
    active: torch.Tensor
    """[B] bool: rows that have not ended."""
    sampling: Sampling = field(default_factory=Sampling)
    generator: torch.Generator | None = None

    @property
    def cache(self) -> Cache | None:
        """The host's, of `transformers`; None on our own runtime."""
        return self.host.cache

    @property
    def is_greedy(self) -> bool:
        """Take the most likely token, always."""
        return self.sampling.temperature == 0


@dataclass(frozen=True)
class Draft:
    """Guessed tokens, to be checked."""

    token_ids: torch.Tensor
    """[B, G]."""
    lengths: torch.Tensor
    """[B]: how many of them each row means."""
    probs: torch.Tensor | None = None
    """[B, G, V], what they were drawn from; None when they were not drawn."""


class Drafter:
    """Guesses what comes next. This one guesses nothing, which makes speculation plain decoding.

    A drafter serves one generation at a time: `begin` forgets the one before.
    """

    needs_cache: ClassVar[bool] = True
    """It looks into `state.cache`, so that our own runtime, which has no such cache, cannot run it."""

    def begin(self, state: State) -> None:
        """The prompt has been read and its next token chosen."""

    def propose(self, state: State, limits: torch.Tensor) -> Draft:
        """Guess at most `limits` [B] tokens a row after `state.token_ids`. The model's cache must be left as found."""
        return no_draft(state)

    def settle(self, state: State, num_drafted: int, drops: list[int]) -> None:
        """The model has checked a draft of `num_drafted` tokens: of those and the one before them, row b took back
        `drops[b]`. `state` already holds what follows."""


def no_draft(state: State) -> Draft:
    """A draft without tokens."""
    num_rows, device = len(state.token_ids), state.token_ids.device
    empty = torch.zeros(num_rows, 0, dtype=torch.long, device=device)
    return Draft(empty, torch.zeros(num_rows, dtype=torch.long, device=device))


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When to stop drafting before the limit.

    The risk that something drafted so far will be rejected is taken as 1 - (product of the draft's own probabilities of
    its tokens). SpecDec++ (arXiv 2405.19715) stops by the same product of a trained head's acceptance predictions;
    using the draft's own is our choice, and needs no training.
    """

    risk: float = 1.0
    """Stop a row once the risk exceeds this; 1 never stops."""

    def __post_init__(self) -> None:
        if not 0 < self.risk <= 1:
            raise bad_setting("risk", self.risk, "above 0 and at most 1")
