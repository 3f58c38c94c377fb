"""The nested FFN for up to 16 tokens: one kernel over blocks of channels, and a second small one that adds up.

A program takes a block of channels from gate and up to its share of the output. A block beyond the widest token's
width is never read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rheostat.kernels.structs import ACTIVATIONS
from rheostat.kernels.triton.ffn_launch import COLUMNS, FFNTiles, bias_dtype, operands, table_constants
from rheostat.kernels.triton.language import activate, dot, jit, load_scale, load_tile, next_power, tl
from rheostat.kernels.triton.products import MOST_ROWS

if TYPE_CHECKING:
    from rheostat.kernels.triton.ffn import NestedWeights

FUSED = (
    FFNTiles(0, 32, 128, 64), FFNTiles(0, 16, 128, 64), FFNTiles(0, 64, 128, 64), FFNTiles(0, 32, 256, 32),
    FFNTiles(0, 64, 64, 128), FFNTiles(0, 32, 128, 64, 8, 2), FFNTiles(0, 64, 128, 64, 8, 3),
)  # fmt: skip
"""Ways to cut that may be the fastest, the default first; none was tuned on a GPU."""


@jit
def _fused(
    x, experts, sizes, table, parts, num_rows, inputs, outputs, x_row, x_col,
    gate, gate_scales, gate_least, gate_row, gate_scale_row, up, up_scales, up_least, up_row, up_scale_row,
    NUM_DOWNS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """parts [blocks, num_rows, outputs]: what program i's BF channels add to each row, where a row is that wide."""
    m = tl.arange(0, BM)
    expert = tl.load(experts + m, mask=m < num_rows, other=-1)
    width = tl.load(sizes + expert, mask=expert >= 0, other=0)  # [BM]
    block = tl.program_id(0)
    c = block * BF + tl.arange(0, BF)
    widest = tl.multiple_of(tl.max(width, 0), ALIGN)
    if block * BF < widest:
        is_used = c < widest
        g = tl.zeros((BF, BK if BM == 1 else BM), tl.float32)
        u = tl.zeros((BF, BK if BM == 1 else BM), tl.float32)
        for first in range(0, inputs, BK):
            k = first + tl.arange(0, BK)
            place = x + m.to(tl.int64)[:, None] * x_row + k[None, :] * x_col
            row = tl.load(place, mask=(m < num_rows)[:, None] & (k < inputs)[None, :], other=0.0).to(DTYPE)
            a = load_tile(
                gate, gate_scales, gate_least, gate_row, gate_scale_row, c, is_used, first, inputs,
                FORMAT, GROUP, BF, BK, DTYPE,
            )  # fmt: skip
            b = load_tile(
                up, up_scales, up_least, up_row, up_scale_row, c, is_used, first, inputs,
                FORMAT, GROUP, BF, BK, DTYPE,
            )  # fmt: skip
            if BM == 1:
                wide = row.to(tl.float32)
                g += a.to(tl.float32) * wide
                u += b.to(tl.float32) * wide
            else:
                g = dot(a, tl.trans(row), g)
                u = dot(b, tl.trans(row), u)
        if BM == 1:
            g, u = tl.sum(g, 1, keep_dims=True), tl.sum(u, 1, keep_dims=True)
        g *= load_scale(gate_scales, c, is_used, FORMAT, BF)[:, None]
        u *= load_scale(up_scales, c, is_used, FORMAT, BF)[:, None]
        hidden = activate(g, ACTIVATION) * u  # [BF, BM]
        for e in range(NUM_DOWNS):
            is_mine = (expert == e) & (width > block * BF) if NUM_DOWNS > 1 else width > block * BF  # [BM]
            if tl.max(is_mine.to(tl.int32), 0) > 0:
                line = table + e * COLUMNS
                values = tl.multiple_of(tl.load(line).to(tl.pointer_type(VALUES)), 16)
                scales = tl.load(line + 1).to(tl.pointer_type(SCALES))
                least = tl.load(line + 2).to(tl.pointer_type(SCALES))
                stride, scale_stride = tl.multiple_of(tl.load(line + 4), ALIGN), tl.load(line + 5)
                end = tl.multiple_of(tl.max(tl.where(is_mine, width, 0), 0), ALIGN)
                here = tl.where(is_mine[None, :] & (c[:, None] < width[None, :]), hidden, 0.0).to(DTYPE)
                for first in range(0, outputs, BD):
                    n = first + tl.arange(0, BD)
                    w = load_tile(
                        values, scales, least, stride, scale_stride, n, n < outputs, block * BF, end,
                        FORMAT, GROUP, BD, BF, DTYPE,
                    )  # fmt: skip
                    if BM == 1:
                        y = tl.sum(w.to(tl.float32) * tl.trans(here.to(tl.float32)), 1, keep_dims=True)
                    else:
                        y = dot(w, here, tl.zeros((BD, BM), tl.float32))
                    y *= load_scale(scales, n, n < outputs, FORMAT, BD)[:, None]
                    place = parts + (block * num_rows + m).to(tl.int64)[None, :] * outputs + n[:, None]
                    tl.store(place, y, mask=(n < outputs)[:, None] & is_mine[None, :])


@jit
def _add_up(
    parts, experts, sizes, table, out, num_rows, outputs, out_row,
    NUM_DOWNS: tl.constexpr, BIAS: tl.constexpr, BF: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [num_rows, outputs]: the sum of row i's parts, in their order, and its bias; zeros for expert -1."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BD + tl.arange(0, BD)
    is_output = n < outputs
    expert = tl.load(experts + row)
    width = tl.load(sizes + expert, mask=expert >= 0, other=0)
    blocks = (width + BF - 1) // BF
    acc = tl.zeros((BB, BD), tl.float32)
    for first in range(0, blocks, BB):
        b = first + tl.arange(0, BB)
        place = parts + (b * num_rows + row).to(tl.int64)[:, None] * outputs + n[None, :]
        acc += tl.load(place, mask=(b < blocks)[:, None] & is_output[None, :], other=0.0)
    y = tl.sum(acc, 0)
    line = table + (expert if NUM_DOWNS > 1 else 0) * COLUMNS
    address = tl.load(line + 3, mask=expert >= 0, other=0)
    if address != 0:
        y += tl.load(address.to(tl.pointer_type(BIAS)) + n, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * out_row + n, y.to(out.dtype.element_ty), mask=is_output)


def run_few(
    ffn: NestedWeights, x: torch.Tensor, experts: torch.Tensor, activation: str, tiles: FFNTiles
) -> torch.Tensor:
    """Tokens x [M, D], M at most `MOST_ROWS`, through `experts` [M]: [M, D] in the dtype of x."""
    num_rows, outputs, down = len(x), ffn.hidden_size, ffn.downs[0]
    rows, block = 1 if num_rows == 1 else MOST_ROWS, max(tiles.channels, down.group)
    num_blocks = -(-ffn.widths[-1] // block)
    parts = torch.empty(num_blocks, num_rows, outputs, dtype=torch.float32, device=x.device)
    _fused[(num_blocks,)](
        x, experts, ffn.sizes, ffn.table, parts, num_rows, x.shape[1], outputs, x.stride(0), x.stride(1),
        *operands(ffn.gate, ffn.up), NUM_DOWNS=len(ffn.downs), FORMAT=down.kind, GROUP=down.group,
        ACTIVATION=ACTIVATIONS[activation], **table_constants(ffn.downs, ffn.widths, x),
        BM=rows, BF=block, BK=max(tiles.inputs, down.group), BD=tiles.outputs,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    width = min(128, next_power(outputs, 16))
    _add_up[(num_rows, -(-outputs // width))](
        parts, experts, ffn.sizes, ffn.table, out, num_rows, outputs, out.stride(0),
        NUM_DOWNS=len(ffn.downs), BIAS=bias_dtype(ffn.biases, x), BF=block, BB=16, BD=width, num_warps=4,
    )  # fmt: skip
    return out
