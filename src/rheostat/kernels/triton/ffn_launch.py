"""What both ways through the nested FFN share on a GPU: how they are cut, and how the weights reach the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rheostat.kernels.triton.language import constant, dtype_of
from rheostat.kernels.triton.matrix import DeviceMatrix
from rheostat.kernels.triton.products import compute_dtype

COLUMNS = constant(6)
"""Of the table of down projections: addresses of values, scales, least values and bias (0: none), and the strides of
values and of scales."""


@dataclass(frozen=True)
class FFNTiles:
    """How the FFN is cut: what one program multiplies at a time."""

    rows: int
    """Tokens of a tile; 0 is the kernel for few tokens, which takes all there are."""
    channels: int
    inputs: int
    outputs: int
    warps: int = 4
    stages: int = 3


def table_of(downs: Sequence[DeviceMatrix], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The table of down projections, [downs, COLUMNS] int64 on their device."""
    lines = [
        [*(0 if one is None else one.data_ptr() for one in (w.values, w.scales, w.least, bias)),
         w.stride, w.scale_stride]
        for w, bias in zip(downs, biases, strict=True)
    ]  # fmt: skip
    return torch.tensor(lines, device=downs[0].values.device)


def operands(*matrices: DeviceMatrix) -> list[torch.Tensor | int | None]:
    """Matrices as the kernels take them."""
    return [one for w in matrices for one in (w.values, w.scales, w.least, w.stride, w.scale_stride)]


def table_constants(downs: Sequence[DeviceMatrix], widths: Sequence[int], x: torch.Tensor) -> dict[str, Any]:
    """What a kernel has to know of the table's matrices when it is compiled, for tokens x and experts that are
    `widths` channels wide: dtypes, and what all its offsets are multiples of."""
    scales = torch.float16 if downs[0].scales is None else downs[0].scales.dtype
    return {
        "DTYPE": compute_dtype(x, downs[0]),
        "VALUES": dtype_of(downs[0].values.dtype),
        "SCALES": dtype_of(scales),
        "ALIGN": math.gcd(16, *widths, *(number for w in downs for number in (w.stride, w.shape[1]))),
    }


def bias_dtype(biases: Sequence[torch.Tensor | None], x: torch.Tensor) -> Any:
    """Of the table's biases; any will do where there is none."""
    return dtype_of(next((bias.dtype for bias in biases if bias is not None), x.dtype))
