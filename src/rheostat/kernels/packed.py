"""Weights in the form that the kernels stream: panels of 16 outputs, cells of 64 inputs.

A matrix W [N, K] multiplies as y = x W^T. A slice of outputs is one contiguous piece, and a prefix of inputs is one
contiguous piece of each panel, so a narrower expert reads fewer bytes and skips none. `native/matrix.h` has the layout.

Formats, and bits a weight: `fp32` 32, `bf16` and `fp16` 16, `int8` 8 (a scale for each output), `int4` 4 + 32 / group
(a scale and a least value, float16, for each group of inputs of each output).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.build import library
from rheostat.kernels.memory import aligned_bytes

LANES, CELL = 16, 64
"""Outputs side by side in a panel; inputs in a cell."""

FORMATS = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4}
"""Name -> its number in `native/matrix.h`."""

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

GROUPS = (32, 64)
"""Inputs of one int4 group."""

BYTE_BIAS = 128
"""What int8 weights are raised by, because the processor multiplies unsigned by signed bytes."""

SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.82)
"""Ranges of an int4 group that are tried, as shares of the full one; the one with the least squared error is taken."""

CHUNK = 4096
"""Outputs packed at a time, which bounds the memory that packing takes."""


class CMatrix(ctypes.Structure):
    """`Matrix` of native/matrix.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("cell_bytes", ctypes.c_int64),
        ("panel_bytes", ctypes.c_int64),
    )


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [N, K] in one of `FORMATS`. Made by `pack`; its memory must not be written to."""

    shape: tuple[int, int]
    """(N, K)."""
    format: str
    group: int
    """Inputs that share a scale (int4), else 0."""
    data: torch.Tensor
    """[panels, panel bytes] uint8."""
    scales: torch.Tensor | None
    """[16 * panels] float32, int8 only."""

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell."""
        return cell_bytes(self.format, self.group)

    def bytes_of(self, num_rows: int | None = None, num_cols: int | None = None) -> int:
        """Bytes read by a product with the first `num_rows` outputs and `num_cols` inputs (default: all)."""
        rows = self.shape[0] if num_rows is None else num_rows
        cols = self.shape[1] if num_cols is None else num_cols
        panels = -(-rows // LANES)
        return panels * -(-cols // CELL) * self.cell_bytes + (panels * LANES * 4 if self.scales is not None else 0)

    def unpack(self) -> torch.Tensor:
        """The weights [N, K], float32, as the products see them."""
        parts = [self._unpack(p, p + CHUNK // LANES) for p in range(0, len(self.data), CHUNK // LANES)]
        whole = torch.cat(parts) if parts else torch.zeros(0, self.shape[1])
        return whole[: self.shape[0], : self.shape[1]].contiguous()

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows [n, K] float32 at index [n] int64."""
        panels = index // LANES
        picked = PackedMatrix(
            (len(index) * LANES, self.shape[1]),
            self.format,
            self.group,
            self.data[panels],
            None if self.scales is None else self.scales.view(-1, LANES)[panels].flatten(),
        )
        return picked.unpack().view(len(index), LANES, self.shape[1])[torch.arange(len(index)), index % LANES]

    def descriptor(self) -> CMatrix:
        """What the native code takes; valid as long as this matrix is."""
        return CMatrix(
            self.data.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            FORMATS[self.format],
            self.group,
            *self.shape,
            self.cell_bytes,
            self.data.shape[1],
        )

    def _unpack(self, start: int, stop: int) -> torch.Tensor:
        """Panels start..stop as [16 * panels, K rounded up]."""
        data = self.data[start:stop]
        num = len(data)
        if self.format in FLOATS:
            values = data.view(FLOATS[self.format]).float()
            inner = 2 if self.format == "bf16" else 1
            return _from_lanes(values.view(num, -1, LANES, inner))
        if self.format == "int8":
            assert self.scales is not None
            values = _from_lanes(data.view(num, -1, LANES, 4).float() - BYTE_BIAS)
            return values * self.scales[start * LANES : stop * LANES, None]
        groups = data.view(num, -1, 4 * LANES + 8 * self.group)  # [P, groups, bytes]
        scale, least = groups[..., :64].contiguous().view(torch.float16).float().split(LANES, -1)  # [P, groups, 16]
        codes = groups[..., 64:].reshape(num, groups.shape[1], -1, LANES, 4)  # [P, groups, g / 8, 16, 4]
        both = torch.cat([codes & 15, codes >> 4], 2)  # [P, groups, g / 4, 16, 4]
        values = both * scale[:, :, None, :, None] + least[:, :, None, :, None]
        return _from_lanes(values.reshape(num, -1, LANES, 4))


def pack(weight: torch.Tensor, format: str, group: int = 32) -> PackedMatrix:
    """Pack a weight [N, K] of any float dtype.

    Args:
        format: one of `FORMATS`.
        group: inputs that share a scale, for int4.

    Raises:
        SettingError: no such format or group; not a matrix; values that the format cannot hold.
    """
    if format not in FORMATS:
        raise bad_setting("format", format, f"one of {', '.join(FORMATS)}")
    if format == "int4" and group not in GROUPS:
        raise bad_setting("group", group, f"one of {', '.join(map(str, GROUPS))}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise bad_setting("weight", f"{weight.dtype} {tuple(weight.shape)}", "a matrix of floats")
    group = group if format == "int4" else 0
    num_rows, num_cols = weight.shape
    panels, cells = -(-num_rows // LANES), -(-num_cols // CELL)
    panel_bytes = cells * cell_bytes(format, group)
    data = aligned_bytes(panels * panel_bytes).view(panels, panel_bytes)
    scales = torch.zeros(panels * LANES) if format == "int8" else None
    if format == "bf16" and _pack_natively(weight, data):
        return PackedMatrix((num_rows, num_cols), format, group, data, scales)
    for start in range(0, num_rows, CHUNK):
        rows = weight[start : start + CHUNK].detach().cpu()
        padded = rows.contiguous()
        if len(rows) % LANES or num_cols % CELL:
            padded = torch.zeros(-(-len(rows) // LANES) * LANES, cells * CELL, dtype=rows.dtype)
            padded[: len(rows), :num_cols] = rows
        part = data[start // LANES : start // LANES + len(padded) // LANES]
        if format in FLOATS:
            _pack_floats(padded, format, part)
        elif format == "int8":
            assert scales is not None
            scales[start : start + len(padded)] = _pack_int8(padded.float(), part)
        else:
            _pack_int4(padded.float(), group, part)
    return PackedMatrix((num_rows, num_cols), format, group, data, scales)


def check_edges(sizes: tuple[int, ...], matrix: PackedMatrix) -> None:
    """Refuse experts (prefixes of `matrix`'s inputs) whose edge lies inside an int4 group.

    Raises:
        SettingError: one does.
    """
    for size in sizes[:-1]:
        if matrix.group and size % matrix.group:
            allowed = f"with experts of multiples of {matrix.group} channels, so that no group straddles an edge"
            raise bad_setting("tile", size, allowed)


def cell_bytes(format: str, group: int) -> int:
    """Bytes of 16 outputs by 64 inputs."""
    if format in FLOATS:
        return LANES * CELL * FLOATS[format].itemsize
    return LANES * CELL if format == "int8" else CELL // group * (4 * LANES + 8 * group)


def _from_lanes(values: torch.Tensor) -> torch.Tensor:
    """[P, K / i, 16, i] -> [16 * P, K]."""
    return values.permute(0, 2, 1, 3).reshape(values.shape[0] * LANES, -1)


def _to_lanes(values: torch.Tensor, inner: int) -> torch.Tensor:
    """[16 * P, K] -> [P, K / inner, 16, inner], a view."""
    return values.view(len(values) // LANES, LANES, -1, inner).permute(0, 2, 1, 3)


def _pack_floats(weight: torch.Tensor, format: str, out: torch.Tensor) -> None:
    values = weight.to(FLOATS[format])
    if not bool(values.isfinite().all()):
        raise bad_setting("format", format, "one whose range holds all weights (or the weights are not finite)")
    if format == "bf16":
        _copy_fours(values, out)
    else:
        lanes = _to_lanes(values, 1)
        out.view(FLOATS[format]).view(lanes.shape).copy_(lanes)


def _pack_natively(weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Pack as bfloat16 with all threads: a prompt waits for it. Returns False where that cannot be done, or where it
    would have to be refused."""
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu" and weight.stride(1) == 1
    code = library() if known and weight.numel() else None
    if code is None:
        return False
    is_finite = code.rheostat_pack_bfloat(
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(weight.stride(0)),
        int(weight.dtype == torch.bfloat16),
        *weight.shape,
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(out.stride(0)),
        torch.get_num_threads(),
    )
    return bool(is_finite)


def _pack_int8(weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Scales [16 * P]."""
    scale = weight.abs().amax(1) / 127
    _check_finite(scale, "int8")
    codes = (weight / torch.where(scale > 0, scale, 1)[:, None]).round_().clamp_(-127, 127).add_(BYTE_BIAS)
    _copy_fours(codes.to(torch.uint8), out)
    return scale


def _copy_fours(values: torch.Tensor, out: torch.Tensor) -> None:
    """A pair of bfloat16, or a quad of bytes, is copied as one number: several times as fast."""
    lanes = _to_lanes(values.view(torch.int32), 1)
    out.view(torch.int32).view(lanes.shape).copy_(lanes)


def _pack_int4(weight: torch.Tensor, group: int, out: torch.Tensor) -> None:
    groups = weight.view(-1, group)  # [16 * P * K / g, g]
    _check_finite(groups.abs().amax(1), "int4")  # least values are kept in float16
    codes, scale, least = quantise_groups(groups)
    panels = len(weight) // LANES
    low, high = codes.view(len(groups), 2, group // 2).unbind(1)
    both = _to_lanes((low | high << 4).view(len(weight), -1), 4)  # [P, groups * g / 8, 16, 4]
    target = out.view(panels, -1, 64 + 8 * group)
    target[..., 64:] = both.reshape(panels, target.shape[1], -1)
    for place, values in ((0, scale), (32, least)):
        lanes = values.half().view(panels, LANES, -1).transpose(1, 2).contiguous()  # [P, groups, 16]
        target[..., place : place + 32] = lanes.view(torch.uint8)


def quantise_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 [n, g] uint8, scales [n] and least values [n] (both exact in float16): w = scale * code + least.

    Weights that already lie on such a grid (of a Q4_1 file, say) keep their values to the last bit.
    """
    low, high = groups.amin(1), groups.amax(1)
    best = torch.full_like(low, math.inf)
    codes, scale, least = torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(low), torch.zeros_like(low)
    todo = torch.arange(len(groups))
    for shrink in SHRINKS:
        part, a, b = groups[todo], low[todo], high[todo]
        cut = (b - a) * (1 - shrink) / 2
        s, m = ((b - a - 2 * cut) / 15).half().float(), (a + cut).half().float()
        q = ((part - m[:, None]) / torch.where(s > 0, s, 1)[:, None]).round_().clamp_(0, 15)
        error = (q * s[:, None] + m[:, None] - part).square_().sum(1)
        better = error < best[todo]
        place = todo[better]
        best[place], scale[place], least[place] = error[better], s[better], m[better]
        codes[place] = q[better].to(torch.uint8)
        size = part.square().sum(1)
        todo = todo[best[todo] > 1e-9 * size]  # the others are exact
        if not len(todo):
            break
    return codes, scale, least


def _check_finite(values: torch.Tensor, format: str) -> None:
    if not bool((values <= 65504).all()):  # false for what is not a number, too
        raise bad_setting("format", format, "one whose range holds all weights (or the weights are not finite)")
