"""Linear layers with a second, 4-bit set of weights that is read while drafting.

This is the plain twin of a 4-bit kernel: the draft's weights have exactly the values that 4 bits can hold, and are
kept as numbers of the model's own dtype. It shows what a draft is worth; it saves neither memory nor time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from rheostat.caches.planes import dequantise, quantise
from rheostat.methods.base import StandIn

_is_drafting: ContextVar[bool] = ContextVar("rheostat_is_drafting", default=False)


@contextmanager
def drafting() -> Iterator[None]:
    """Inside, every `TwinLinear` reads its 4-bit weights. Other threads and tasks are not affected."""
    token = _is_drafting.set(True)
    try:
        yield
    finally:
        _is_drafting.reset(token)


class TwinLinear(StandIn):
    """Takes a linear layer's place and shares its parameters, under the same names.

    `weight` is what is to be read now. Whoever slices it (a method that runs part of an FFN, for one) drafts with
    4-bit slices and never knows.
    """

    def __init__(self, host: nn.Linear, group_size: int) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make weights of its own
        self.in_features, self.out_features = host.in_features, host.out_features
        self._parameters |= host._parameters
        self._host = (host,)  # in a tuple: no part of the model
        self.group_size = group_size
        self._draft: torch.Tensor | None = None
        self._made_of: tuple[int, int] | None = None
        self.train(host.training)

    @property
    def host(self) -> nn.Linear:
        """The layer whose place this is."""
        return self._host[0]

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[out, in], full while checking, 4-bit values while drafting."""
        full = self._parameters["weight"]
        assert full is not None
        return self._draft_of(full) if _is_drafting.get() else full

    @property
    def saved_bytes(self) -> int:
        """Bytes that a draft pass does not read: full weights less nibbles and a 16-bit scale and zero a group."""
        full = self._parameters["weight"]
        assert full is not None
        return full.nbytes - full.numel() // 2 - 4 * (full.numel() // self.group_size)

    @torch.no_grad()
    def _draft_of(self, full: torch.Tensor) -> torch.Tensor:
        state = (full.data_ptr(), full._version)  # training, loading and re-ordering make the copy stale
        if self._draft is None or state != self._made_of:
            self._draft, self._made_of = four_bit(full, self.group_size), state
        return self._draft


def four_bit(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The values that 4 bits leave of a weight [out, in], in its own dtype.

    Rounded to nearest in groups of `group_size` inputs, each with a least value and a scale of 16 bits. (The published
    weights are symmetric and fitted by GPTQ.)
    """
    planes = quantise(weight.detach().to(torch.float16), -1, group_size).without_lower()
    return dequantise(planes, -1, group_size, 4).to(weight.dtype)
