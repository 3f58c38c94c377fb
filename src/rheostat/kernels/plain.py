"""The plain PyTorch twins of the native kernels: the same signatures, for reading, for tests, and where there is no
compiler."""

from __future__ import annotations

import torch
from torch import nn

from rheostat.kernels.packed import PackedMatrix


def few_rows(
    x: torch.Tensor,
    w: PackedMatrix,
    start: int = 0,
    stop: int | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rheostat.kernels.few_rows`."""
    y = nn.functional.linear(x, w.unpack()[start : w.shape[0] if stop is None else stop], bias)
    return y if out is None else out.copy_(y)
