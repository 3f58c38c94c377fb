"""Products of few rows with packed weights, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.packed import FLOATS
from rheostat.kernels.triton.language import DTYPES, check_device, dot, dtype_of, jit, load_scale, load_tile, tl
from rheostat.kernels.triton.matrix import DeviceMatrix

MOST_ROWS = 16
"""Rows that share one reading of the weights; more are taken in turns."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: what one program multiplies at a time."""

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 3


ONE_ROW, FEW_ROWS = Tiles(16, 256), Tiles(32, 128)
"""Not tuned on any GPU: `benchmarks/gpu_table.py` tries `CANDIDATES`."""

CANDIDATES = {
    1: (ONE_ROW, Tiles(8, 512), Tiles(4, 1024), Tiles(32, 128), Tiles(8, 1024, 8), Tiles(2, 2048, 4)),
    16: (FEW_ROWS, Tiles(16, 128), Tiles(64, 64), Tiles(64, 128), Tiles(16, 256, 4, 4), Tiles(32, 256, 4, 2)),
}
"""Rows of a tile -> ways to cut that may be the fastest."""


@jit
def _few_rows(
    x, values, scales, least, bias, out, num_rows, start, num_outputs, inputs,
    x_row, x_col, stride, scale_stride, out_row,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [num_rows, num_outputs] of outputs from `start` on: program (i, j) makes BN of them, of the j-th BM rows."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    is_row, is_output = m < num_rows, n < num_outputs
    # One row is added up across inputs at the end: no exchange between threads in the loop.
    acc = tl.zeros((BN, BK if BM == 1 else BM), tl.float32)
    for first in range(0, inputs, BK):
        k = first + tl.arange(0, BK)
        w = load_tile(
            values, scales, least, stride, scale_stride, start + n, is_output, first, inputs,
            FORMAT, GROUP, BN, BK, DTYPE,
        )  # fmt: skip
        place = x + m.to(tl.int64)[:, None] * x_row + k[None, :] * x_col
        part = tl.load(place, mask=is_row[:, None] & (k < inputs)[None, :], other=0.0).to(DTYPE)
        if BM == 1:
            acc += w.to(tl.float32) * part.to(tl.float32)
        else:
            acc = dot(w, tl.trans(part), acc)
    if BM == 1:
        acc = tl.sum(acc, 1, keep_dims=True)
    y = acc * load_scale(scales, start + n, is_output, FORMAT, BN)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
    place = out + m.to(tl.int64)[None, :] * out_row + n[:, None]
    tl.store(place, y.to(out.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


def few_rows(
    x: torch.Tensor,
    w: DeviceMatrix,
    start: int = 0,
    stop: int | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """y = x W[start:stop]^T + bias, reading the weights once for up to 16 rows. `plain.few_rows` is its twin.

    Args:
        x: [M, K] float32, bfloat16 or float16; of any strides.
        w: [N, K], on the same device.
        bias: [stop - start], of any float dtype.
        out: [M, stop - start], of any float dtype, its columns side by side; written to and returned.
        tiles: how to cut the product.

    Returns:
        [M, stop - start] in the dtype of x. Sums are float32. Weights are multiplied in the wider dtype of x and
        float weights, int8 codes in that of x without loss, and int4 weights after rounding to that of x.

    Raises:
        SettingError: shapes, dtypes, devices or the slice do not fit.
    """
    stop = w.shape[0] if stop is None else stop
    check_rows(x, w, "x")
    if not 0 <= start <= stop <= w.shape[0]:
        raise bad_setting("start, stop", (start, stop), f"0 <= start <= stop <= {w.shape[0]}")
    shape = (len(x), stop - start)
    if bias is not None and (bias.shape != shape[1:] or bias.stride() != (1,) or bias.device != x.device):
        raise bad_setting("bias", tuple(bias.shape), f"of shape ({shape[1]},), contiguous, on {x.device}")
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    elif (
        out.shape != shape or out.dtype not in DTYPES or out.device != x.device or (shape[1] > 1 and out.stride(1) != 1)
    ):
        raise bad_setting("out", f"{out.dtype} {tuple(out.shape)}", f"floats {shape}, columns side by side")
    if not out.numel():
        return out
    rows = 1 if len(x) == 1 else MOST_ROWS
    tiles = tiles or (ONE_ROW if rows == 1 else FEW_ROWS)
    _few_rows[(-(-shape[1] // tiles.outputs), -(-len(x) // rows))](
        x, w.values, w.scales, w.least, bias, out, len(x), start, shape[1], w.shape[1],
        x.stride(0), x.stride(1), w.stride, w.scale_stride, out.stride(0),
        FORMAT=w.kind, GROUP=w.group, HAS_BIAS=bias is not None, DTYPE=compute_dtype(x, w),
        BM=rows, BN=tiles.outputs, BK=max(tiles.inputs, w.group), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def check_rows(x: torch.Tensor, w: DeviceMatrix, name: str) -> None:
    """Refuse rows that do not fit a matrix.

    Raises:
        SettingError: under the name given.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or x.shape[1] != w.shape[1]:
        raise bad_setting(name, f"{x.dtype} {tuple(x.shape)}", f"floats [M, {w.shape[1]}]")
    if x.device != w.values.device:
        raise bad_setting(name, f"on {x.device}", f"where the weights are, on {w.values.device}")
    check_device(x.device)


def compute_dtype(x: torch.Tensor, w: DeviceMatrix) -> Any:
    """What products multiply in, as Triton names it: the dtype of x, or a wider one that float weights need."""
    return dtype_of(torch.promote_types(x.dtype, FLOATS[w.format]) if w.format in FLOATS else x.dtype)
