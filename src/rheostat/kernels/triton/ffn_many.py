"""The nested FFN for many tokens: sorted by width, widest first, they go through two grouped products, in which whole
tiles of tokens skip what is beyond their width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rheostat.kernels.structs import ACTIVATIONS
from rheostat.kernels.triton.ffn_launch import COLUMNS, FFNTiles, bias_dtype, operands, table_constants
from rheostat.kernels.triton.language import activate, dot, jit, load_scale, load_tile, tl

if TYPE_CHECKING:
    from rheostat.kernels.triton.ffn import NestedWeights

GROUPED = (
    FFNTiles(64, 64, 64, 128), FFNTiles(128, 64, 64, 128, 8), FFNTiles(128, 128, 64, 256, 8),
    FFNTiles(128, 128, 64, 128, 8, 4), FFNTiles(64, 128, 64, 256, 8), FFNTiles(16, 64, 128, 64),
)  # fmt: skip
"""Ways to cut that may be the fastest, the default first; none was tuned on a GPU."""


@jit
def _gate_up(
    x, experts, sizes, order, hidden, num_rows, inputs, x_row, x_col, hidden_row,
    gate, gate_scales, gate_least, gate_row, gate_scale_row, up, up_scales, up_least, up_row, up_scale_row,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden [num_rows, F]: act(gate x) * up x of the tokens in their order, as far as each is wide."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    token = tl.load(order + m, mask=m < num_rows, other=0)
    expert = tl.load(experts + token, mask=m < num_rows, other=-1)
    width = tl.load(sizes + expert, mask=expert >= 0, other=0)
    start = tl.program_id(0) * BF
    widest = tl.max(width, 0)
    if start < widest:
        c = start + tl.arange(0, BF)
        is_used = c < widest
        g, u = tl.zeros((BM, BF), tl.float32), tl.zeros((BM, BF), tl.float32)
        for first in range(0, inputs, BK):
            k = first + tl.arange(0, BK)
            place = x + token.to(tl.int64)[:, None] * x_row + k[None, :] * x_col
            row = tl.load(place, mask=(width > start)[:, None] & (k < inputs)[None, :], other=0.0).to(DTYPE)
            a = load_tile(
                gate, gate_scales, gate_least, gate_row, gate_scale_row, c, is_used, first, inputs,
                FORMAT, GROUP, BF, BK, DTYPE,
            )  # fmt: skip
            b = load_tile(
                up, up_scales, up_least, up_row, up_scale_row, c, is_used, first, inputs,
                FORMAT, GROUP, BF, BK, DTYPE,
            )  # fmt: skip
            g = dot(row, tl.trans(a), g)
            u = dot(row, tl.trans(b), u)
        g *= load_scale(gate_scales, c, is_used, FORMAT, BF)[None, :]
        u *= load_scale(up_scales, c, is_used, FORMAT, BF)[None, :]
        y = (activate(g, ACTIVATION) * u).to(hidden.dtype.element_ty)
        tl.store(hidden + m.to(tl.int64)[:, None] * hidden_row + c[None, :], y, mask=c[None, :] < width[:, None])


@jit
def _down(
    hidden, experts, sizes, order, table, out, num_rows, outputs, hidden_row, out_row,
    NUM_DOWNS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    VALUES: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [num_rows, outputs], at the tokens' own places: their experts' down projections of `hidden`."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    token = tl.load(order + m, mask=m < num_rows, other=0)
    expert = tl.load(experts + token, mask=m < num_rows, other=-1)
    width = tl.load(sizes + expert, mask=expert >= 0, other=0)
    n = tl.program_id(0) * BD + tl.arange(0, BD)
    is_output = n < outputs
    place = out + token.to(tl.int64)[:, None] * out_row + n[None, :]
    nothing = tl.zeros((BM, BD), out.dtype.element_ty)
    tl.store(place, nothing, mask=((m < num_rows) & (expert < 0))[:, None] & is_output[None, :])
    for e in range(NUM_DOWNS):
        is_mine = (expert == e) if NUM_DOWNS > 1 else (expert >= 0)  # [BM]
        if tl.max(is_mine.to(tl.int32), 0) > 0:
            line = table + e * COLUMNS
            values = tl.multiple_of(tl.load(line).to(tl.pointer_type(VALUES)), 16)
            scales = tl.load(line + 1).to(tl.pointer_type(SCALES))
            least = tl.load(line + 2).to(tl.pointer_type(SCALES))
            address = tl.load(line + 3)
            stride, scale_stride = tl.multiple_of(tl.load(line + 4), ALIGN), tl.load(line + 5)
            mine = tl.multiple_of(tl.where(is_mine, width, 0), ALIGN)
            acc = tl.zeros((BM, BD), tl.float32)
            end = tl.multiple_of(tl.max(mine, 0), ALIGN)
            for first in range(0, end, BK):
                k = first + tl.arange(0, BK)
                here = hidden + m.to(tl.int64)[:, None] * hidden_row + k[None, :]
                row = tl.load(here, mask=k[None, :] < mine[:, None], other=0.0).to(DTYPE)
                w = load_tile(
                    values, scales, least, stride, scale_stride, n, is_output, first, end,
                    FORMAT, GROUP, BD, BK, DTYPE,
                )  # fmt: skip
                acc = dot(row, tl.trans(w), acc)
            acc *= load_scale(scales, n, is_output, FORMAT, BD)[None, :]
            if address != 0:
                bias = tl.load(address.to(tl.pointer_type(BIAS)) + n, mask=is_output, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            tl.store(place, acc.to(out.dtype.element_ty), mask=is_mine[:, None] & is_output[None, :])


def run_many(
    ffn: NestedWeights, x: torch.Tensor, experts: torch.Tensor, activation: str, tiles: FFNTiles
) -> torch.Tensor:
    """Tokens x [M, D] through `experts` [M]: [M, D] in the dtype of x."""
    num_rows, outputs, down = len(x), ffn.hidden_size, ffn.downs[0]
    order = experts.argsort(descending=True, stable=True)
    hidden = torch.empty(num_rows, ffn.widths[-1], dtype=x.dtype, device=x.device)  # each row as far as it is wide
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    shared = {"FORMAT": down.kind, "GROUP": down.group, "BM": tiles.rows, "BK": max(tiles.inputs, down.group)}
    shared |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    dtypes, num_tiles = table_constants(ffn.downs, ffn.widths, x), -(-num_rows // tiles.rows)
    _gate_up[(-(-ffn.widths[-1] // tiles.channels), num_tiles)](
        x, experts, ffn.sizes, order, hidden, num_rows, x.shape[1], x.stride(0), x.stride(1), hidden.stride(0),
        *operands(ffn.gate, ffn.up),
        ACTIVATION=ACTIVATIONS[activation], DTYPE=dtypes["DTYPE"], BF=tiles.channels, **shared,
    )  # fmt: skip
    _down[(-(-outputs // tiles.outputs), num_tiles)](
        hidden, experts, ffn.sizes, order, ffn.table, out, num_rows, outputs, hidden.stride(0), out.stride(0),
        NUM_DOWNS=len(ffn.downs), **dtypes, BIAS=bias_dtype(ffn.biases, x), BD=tiles.outputs, **shared,
    )  # fmt: skip
    return out
