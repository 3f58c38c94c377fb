"""Several processes at one job, as `accelerate launch` (or `torchrun`) starts them; with one, all of this is void.

Ranks, process groups and barriers are accelerate's and PyTorch's; here is only what the rest of the library asks.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from rheostat.errors import SettingError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

LONG = timedelta(days=7)
"""How long processes wait for each other: fits and evaluations take minutes to hours, and a dead process is noticed
anyway."""


SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""What `accelerate launch` sets where the model itself is to be shared out, and what that is called."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is; by default it is alone."""

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
        """Leave the group, at the end of the program; the second time nothing happens."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def count() -> int:
    """How many processes share this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return rank() == 0


def join(*, cpu: bool | None = None) -> Ranks:
    """Meet the other processes. To be called before anything else does: the first call sets the patience.

    Args:
        cpu: meet on the CPU; left out, what `accelerate launch` was told decides.

    Raises:
        SettingError: `accelerate launch` was told to share out the model itself.
    """
    check_whole()
    if count() == 1:
        return Ranks()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") if cpu is None else cpu, timeout=LONG)
    ranks = Ranks(state.process_index, state.num_processes)
    atexit.register(ranks.close)  # a group that is still there when the interpreter is torn down can abort the process
    return ranks


def check_whole() -> None:
    """Refuse launches in which a process is to hold a part of the model only: on CPUs accelerate would leave that out
    without a word, and gradients are averaged here as those of whole models.

    Raises:
        SettingError: this is one.
    """
    for flag, kind in SHARDED.items():
        if os.environ.get(flag, "false").lower() in ("true", "1", "yes"):
            raise SettingError(
                f"{kind}: is not supported, each process holds the whole model; use accelerate launch without it"
            )


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
