"""Sharing work among the processes of `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

PATIENCE = timedelta(weeks=1)
"""How long a process waits for the others: some batches take long, and rank 0 may have further work."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is."""

    index: int = 0
    count: int = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of `items` is this process's to do: all processes see the same list."""
        return items[self.index :: self.count]

    def gather(self, mine: T) -> list[T]:
        """What each process has, in order of rank, on all of them."""
        if self.count == 1:
            return [mine]
        from accelerate.utils import gather_object

        return gather_object([mine])

    def device(self, name: str) -> str:
        """`name`, or where it means "the GPU", the one of this process."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and self.count > 1 else name

    def close(self) -> None:
        """Leave the group, at the end of the program."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def join() -> Ranks:
    """Join the processes that a launcher started together; without one, this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    return Ranks(state.process_index, state.num_processes)
