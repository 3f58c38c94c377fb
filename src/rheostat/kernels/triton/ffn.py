"""The nested FFN with a width for each token, on a GPU: y = down(act(gate x) * up x) over a prefix of the channels.

Up to 16 tokens go through one kernel: a program takes a block of channels from gate and up to its share of the
output, which a second small kernel adds up in a fixed order. A block beyond the widest token's width is never read.
More tokens are sorted by width, widest first, and go through two grouped products, in which whole tiles of tokens skip
what is beyond their width. Nothing waits for the GPU, so both can be captured in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.structs import ACTIVATIONS
from rheostat.kernels.triton.language import (
    DTYPES,
    activate,
    constant,
    dot,
    dtype_of,
    jit,
    load_scale,
    load_tile,
    next_power,
    tl,
)
from rheostat.kernels.triton.matrix import DeviceMatrix
from rheostat.kernels.triton.products import MOST_ROWS, check_rows, compute_dtype

COLUMNS = constant(6)
"""Of the table of down projections: addresses of values, scales, least values and bias (0: none), and the strides of
values and of scales."""


@dataclass(frozen=True)
class FusedTiles:
    """How the kernel for few tokens is cut."""

    channels: int = 32
    inputs: int = 128
    outputs: int = 64
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class GroupedTiles:
    """How the two products for many tokens are cut."""

    rows: int = 64
    channels: int = 64
    inputs: int = 64
    outputs: int = 128
    warps: int = 4
    stages: int = 3


FUSED = (
    FusedTiles(), FusedTiles(16), FusedTiles(64), FusedTiles(32, 256, 32), FusedTiles(64, 64, 128),
    FusedTiles(32, 128, 64, 8, 2), FusedTiles(64, 128, 64, 8, 3),
)  # fmt: skip
GROUPED = (
    GroupedTiles(), GroupedTiles(128, 64, 64, 128, 8), GroupedTiles(128, 128, 64, 256, 8),
    GroupedTiles(128, 128, 64, 128, 8, 4), GroupedTiles(64, 128, 64, 256, 8), GroupedTiles(16, 64, 128, 64),
)  # fmt: skip
"""Ways to cut that may be the fastest, the default first; none was tuned on a GPU."""


# -- few tokens: one kernel


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


# -- many tokens: two grouped products


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


# -- from Python


@dataclass(frozen=True, eq=False)
class NestedWeights:
    """An FFN ready for the kernels. It refers to the matrices' own memory: keep that where it is."""

    gate: DeviceMatrix
    up: DeviceMatrix
    downs: tuple[DeviceMatrix, ...]
    biases: tuple[torch.Tensor | None, ...]
    widths: tuple[int, ...]
    """Channels of each expert, rising; the last is F."""
    sizes: torch.Tensor
    """The same, [E] int64 on the device."""
    table: torch.Tensor
    """[downs, COLUMNS] int64 on the device."""

    @classmethod
    def of(
        cls,
        gate: DeviceMatrix,
        up: DeviceMatrix,
        downs: Sequence[DeviceMatrix],
        biases: Sequence[torch.Tensor | None],
        sizes: Sequence[int],
    ) -> NestedWeights:
        """See `nested_ffn` for the arguments.

        Raises:
            SettingError: shapes, formats, dtypes or devices do not fit.
        """
        _check_weights(gate, up, downs, biases, sizes)
        lines = [
            [*(0 if one is None else one.data_ptr() for one in (w.values, w.scales, w.least, bias)),
             w.stride, w.scale_stride]
            for w, bias in zip(downs, biases, strict=True)
        ]  # fmt: skip
        place = gate.values.device
        held = torch.tensor(tuple(sizes), device=place), torch.tensor(lines, device=place)
        return cls(gate, up, tuple(downs), tuple(biases), tuple(sizes), *held)

    @property
    def hidden_size(self) -> int:
        """Outputs, which are as many as the inputs in a model."""
        return self.downs[0].shape[0]

    def bytes_of(self, experts: Sequence[int]) -> int:
        """Bytes of weights that a pass over few tokens reads: gate and up as far as the widest, and each down
        projection that is used as far as its widest."""
        used = sorted({e for e in experts if e >= 0})
        if not used:
            return 0
        size = self.widths[used[-1]]
        both = self.gate.bytes_of(num_rows=size) + self.up.bytes_of(num_rows=size)
        if len(self.downs) == 1:
            return both + self.downs[0].bytes_of(num_cols=size)
        return both + sum(self.downs[e].bytes_of() for e in used)

    def run(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        activation: str = "silu",
        tiles: FusedTiles | GroupedTiles | None = None,
    ) -> torch.Tensor:
        """Tokens x [M, D] through `experts` [M]: [M, D] in the dtype of x. Its arguments decide the tiles; without
        any, few tokens go through one kernel.

        Raises:
            SettingError: shapes, dtypes or devices do not fit. Experts are not looked at: -1 to E - 1.
        """
        check_rows(x, self.gate, "x")
        if activation not in ACTIVATIONS:
            raise bad_setting("activation", activation, f"one of {', '.join(ACTIVATIONS)}")
        if experts.shape != (len(x),) or experts.dtype not in (torch.int64, torch.int32) or experts.device != x.device:
            raise bad_setting(
                "experts", f"{experts.dtype} {tuple(experts.shape)}", f"whole numbers ({len(x)},) beside x"
            )
        if isinstance(tiles, FusedTiles) and len(x) > MOST_ROWS:
            raise bad_setting("tiles", "for few tokens", f"for many: there are {len(x)}")
        if not len(x) or not self.hidden_size:
            return x.new_empty(len(x), self.hidden_size)
        experts = experts.contiguous()
        if isinstance(tiles, GroupedTiles) or (tiles is None and len(x) > MOST_ROWS):
            return _run_grouped(self, x, experts, activation, tiles or GROUPED[0])
        return _run_fused(self, x, experts, activation, tiles or FUSED[0])


def nested_ffn(
    x: torch.Tensor,
    gate: DeviceMatrix,
    up: DeviceMatrix,
    downs: Sequence[DeviceMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    experts: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """A gated FFN whose experts are prefixes of its channels, width by row. `plain.nested_ffn` is its twin.

    To call it often, keep the `NestedWeights`: making them takes a copy to the GPU.

    Args:
        x: [M, D] float32, bfloat16 or float16; of any strides.
        gate, up: [F, D], of one format.
        downs: one [D, F], of which each expert takes its first columns; or one [D, sizes[e]] an expert.
        biases: [D] or None, of each of `downs`, of one dtype.
        sizes: channels of each expert, rising; the last is F.
        experts: [M] whole numbers; -1 gives zeros.
        activation: one of `structs.ACTIVATIONS`.

    Returns:
        [M, D] in the dtype of x; sums are float32.

    Raises:
        SettingError: shapes, formats, dtypes, devices or experts do not fit.
    """
    if len(experts) and not -1 <= int(experts.min()) <= int(experts.max()) < len(sizes):
        raise bad_setting("experts", experts.tolist(), f"from -1 to {len(sizes) - 1}")
    return NestedWeights.of(gate, up, downs, biases, sizes).run(x, experts, activation)


def _run_fused(
    ffn: NestedWeights, x: torch.Tensor, experts: torch.Tensor, activation: str, tiles: FusedTiles
) -> torch.Tensor:
    num_rows, outputs, down = len(x), ffn.hidden_size, ffn.downs[0]
    rows, block = 1 if num_rows == 1 else MOST_ROWS, max(tiles.channels, down.group)
    num_blocks = -(-ffn.widths[-1] // block)
    parts = torch.empty(num_blocks, num_rows, outputs, dtype=torch.float32, device=x.device)
    _fused[(num_blocks,)](
        x, experts, ffn.sizes, ffn.table, parts, num_rows, x.shape[1], outputs, x.stride(0), x.stride(1),
        *_both(ffn), NUM_DOWNS=len(ffn.downs), FORMAT=down.kind, GROUP=down.group, ACTIVATION=ACTIVATIONS[activation],
        **_dtypes(ffn, x), BM=rows, BF=block, BK=max(tiles.inputs, down.group), BD=tiles.outputs,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    width = min(128, next_power(outputs, 16))
    _add_up[(num_rows, -(-outputs // width))](
        parts, experts, ffn.sizes, ffn.table, out, num_rows, outputs, out.stride(0),
        NUM_DOWNS=len(ffn.downs), BIAS=_bias_dtype(ffn, x), BF=block, BB=16, BD=width, num_warps=4,
    )  # fmt: skip
    return out


def _run_grouped(
    ffn: NestedWeights, x: torch.Tensor, experts: torch.Tensor, activation: str, tiles: GroupedTiles
) -> torch.Tensor:
    num_rows, outputs, down = len(x), ffn.hidden_size, ffn.downs[0]
    order = experts.argsort(descending=True, stable=True)
    hidden = torch.empty(num_rows, ffn.widths[-1], dtype=x.dtype, device=x.device)  # each row as far as it is wide
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    shared = {"FORMAT": down.kind, "GROUP": down.group, "BM": tiles.rows, "BK": max(tiles.inputs, down.group)}
    shared |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    dtypes, num_tiles = _dtypes(ffn, x), -(-num_rows // tiles.rows)
    _gate_up[(-(-ffn.widths[-1] // tiles.channels), num_tiles)](
        x, experts, ffn.sizes, order, hidden, num_rows, x.shape[1], x.stride(0), x.stride(1), hidden.stride(0),
        *_both(ffn), ACTIVATION=ACTIVATIONS[activation], DTYPE=dtypes["DTYPE"], BF=tiles.channels, **shared,
    )  # fmt: skip
    _down[(-(-outputs // tiles.outputs), num_tiles)](
        hidden, experts, ffn.sizes, order, ffn.table, out, num_rows, outputs, hidden.stride(0), out.stride(0),
        NUM_DOWNS=len(ffn.downs), **dtypes, BIAS=_bias_dtype(ffn, x), BD=tiles.outputs, **shared,
    )  # fmt: skip
    return out


def _both(ffn: NestedWeights) -> list[torch.Tensor | int | None]:
    """Gate and up as the kernels take them."""
    matrices = (ffn.gate, ffn.up)
    return [one for w in matrices for one in (w.values, w.scales, w.least, w.stride, w.scale_stride)]


def _dtypes(ffn: NestedWeights, x: torch.Tensor) -> dict[str, object]:
    down = ffn.downs[0]
    scales = torch.float16 if down.scales is None else down.scales.dtype
    return {
        "DTYPE": compute_dtype(x, down),
        "VALUES": dtype_of(down.values.dtype),
        "SCALES": dtype_of(scales),
        "ALIGN": math.gcd(16, *ffn.widths, *(number for w in ffn.downs for number in (w.stride, w.shape[1]))),
    }


def _bias_dtype(ffn: NestedWeights, x: torch.Tensor) -> object:
    return dtype_of(next((bias.dtype for bias in ffn.biases if bias is not None), x.dtype))


def _check_weights(
    gate: DeviceMatrix,
    up: DeviceMatrix,
    downs: Sequence[DeviceMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != gate.shape[0]:
        raise bad_setting("sizes", tuple(sizes), f"rising, from at least 1 to {gate.shape[0]}")
    if up.shape != gate.shape or any((w.format, w.group) != (gate.format, gate.group) for w in (up, *downs)):
        raise bad_setting(
            "up, downs", [(w.shape, w.format) for w in (up, *downs)], f"as gate: {gate.shape} {gate.format}"
        )
    wanted = [sizes[-1]] if len(downs) == 1 else list(sizes)
    if [w.shape[1] for w in downs] != wanted or len({w.shape[0] for w in downs}) != 1:
        raise bad_setting("downs", [w.shape for w in downs], f"one with {sizes[-1]} inputs, or one an expert")
    given = [bias for bias in biases if bias is not None]
    is_right = len(biases) == len(downs) and len({bias.dtype for bias in given}) <= 1
    if not is_right or any(
        b.shape != (downs[0].shape[0],) or b.dtype not in DTYPES or b.stride() != (1,) for b in given
    ):
        raise bad_setting(
            "biases", [b if b is None else tuple(b.shape) for b in biases], "vectors of floats, one a down"
        )
    tensors = [one for w in (gate, up, *downs) for one in (w.values, w.scales, w.least) if one is not None]
    if len({one.device for one in (*tensors, *given)}) != 1:
        raise bad_setting("weights", "on several devices", "on one")
    if any(w.values.data_ptr() % 16 for w in downs):
        raise bad_setting("downs", "at an odd address", "memory that begins at a multiple of 16 bytes")
