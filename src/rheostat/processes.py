"""Several processes at one job, as `accelerate launch` (or `torchrun`) starts them; with one, all of this is void.

Ranks, process groups and barriers are accelerate's and PyTorch's; here is only what the rest of the library asks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LONG = timedelta(days=7)
"""How long the others wait for the main process: fits take minutes to hours, and a dead process is noticed anyway."""


def count() -> int:
    """How many processes share this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return rank() == 0


def join(*, cpu: bool) -> None:
    """Meet the other processes. To be called before anything else does: the first call sets the patience."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=LONG)


def wait() -> None:
    """Go on when all processes have come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does the block before the others start it."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The mean over processes of every gradient. One that a process does not have counts as zero; one that none has
    stays away, so that its optimiser state rests."""
    if count() == 1:
        return
    wanted = list(parameters)
    if not wanted:
        return
    import torch

    has = torch.tensor([p.grad is not None for p in wanted], dtype=torch.float32, device=wanted[0].device)
    torch.distributed.all_reduce(has)
    for parameter, holders in zip(wanted, has.tolist(), strict=True):
        if holders:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad.div_(count())
