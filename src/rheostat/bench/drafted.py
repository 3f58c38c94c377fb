"""Our own runtime with drafts as a side: the time of each token of an answer, and what drafting came to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rheostat.adapted import Adapted
from rheostat.bench.native import NativeSide
from rheostat.bench.sides import SideSpec
from rheostat.errors import bad_setting
from rheostat.runtime.engine import Runtime
from rheostat.runtime.speculating import NativeHost
from rheostat.speculate.drafter import Drafter
from rheostat.speculate.generating import make_drafter
from rheostat.speculate.loop import Ending, Round, speculate


@dataclass
class Drafting:
    """An answer being written."""

    rounds: Iterator[Round]
    written: list[list[int]]
    """Tokens of each row."""
    has_ended: bool
    asked: int = 1
    """Tokens a row that the bench has asked for."""


class DraftedSide(NativeSide):
    """Greedy, and the text of `NativeSide`; a round writes several tokens, and the bench asks for one at a time."""

    def __init__(self, spec: SideSpec, adapted: Adapted, runtime: Runtime | None = None) -> None:
        """Pack the weights, the draft's too.

        Raises:
            SettingError: no such drafter, or one that this model or our runtime cannot have.
            Unsupported: the runtime cannot run this model in this format.
        """
        check_drafter(spec.draft, adapted)
        super().__init__(spec, adapted, runtime)
        self.runtime.prepare(draft=spec.draft == "self")

    def prefill(self, ids: torch.Tensor) -> Any:
        """One pass over the prompts [B, T]."""
        rounds = speculate(
            self.adapted.model,
            self.adapted.method,
            ids,
            drafter=check_drafter(self.spec.draft, self.adapted),
            draft_length=self.spec.draft_length,
            ending=Ending(max_new_tokens=self.spec.context),
            host=NativeHost(self.runtime, self.adapted.settings),
        )
        first = next(rounds)
        return Drafting(rounds, [new.tolist() for new in first.token_ids], bool(first.is_last.all()))

    def decode(self, state: Any) -> Any:
        """Rounds until every row has one token more than was asked for before; none where a round wrote ahead."""
        state.asked += 1
        while not state.has_ended and min(map(len, state.written)) < state.asked:
            one = next(state.rounds)
            for row, new in zip(state.written, one.token_ids, strict=True):
                row += new.tolist()
            state.has_ended = bool(one.is_last.all())
        return state


def check_drafter(name: str, adapted: Adapted) -> Drafter:
    """The drafter of that name.

    Raises:
        SettingError: there is none for this model, or it needs a cache of `transformers`.
    """
    drafter = make_drafter(name, adapted.method, adapted.dial.low)
    if drafter.needs_cache:
        raise bad_setting("draft", name, "one that our own runtime can run: self, low_dial or prompt_lookup")
    return drafter
