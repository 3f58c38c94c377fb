"""Weights as the Triton kernels read them: row by row, one byte for two int4 codes.

Matrices of `rheostat.kernels.pack` hold panels made for vector registers. On a GPU neighbouring threads read
neighbouring inputs of one output, so here an output's inputs lie side by side. The numbers are the same:
`DeviceMatrix.of` takes codes, scales and least values from a packed matrix as they are.

| format | values | scales | least |
| --- | --- | --- | --- |
| fp32, bf16, fp16 | [N, K] | | |
| int8 | [N, K] int8 | [N] float32 | |
| int4 | [N / 2, K'] uint8: output 2i in the low half, 2i + 1 in the high | [N, K' / group] float16 | the same |

K' is K rounded up to whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.packed import BYTE_BIAS, FLOATS, LANES, PackedMatrix
from rheostat.kernels.packed import pack as pack_panels
from rheostat.kernels.triton.language import KINDS


@dataclass(frozen=True, eq=False)
class DeviceMatrix:
    """A matrix [N, K] that multiplies as y = x W^T."""

    shape: tuple[int, int]
    """(N, K)."""
    format: str
    """One of `kernels.FORMATS`."""
    group: int
    """Inputs that share a scale (int4), else 0."""
    values: torch.Tensor
    scales: torch.Tensor | None = None
    least: torch.Tensor | None = None

    @classmethod
    def of(cls, packed: PackedMatrix, device: torch.device | str = "cpu") -> DeviceMatrix:
        """The same numbers as `packed`."""
        rows, cols = packed.shape
        if packed.format in FLOATS:
            return cls(packed.shape, packed.format, 0, packed.unpack().to(FLOATS[packed.format]).to(device))
        if packed.format == "int8":
            assert packed.scales is not None
            codes = _from_lanes(packed.data.view(*_quads(packed.data), LANES, 4))[:rows, :cols]
            values = (codes.to(torch.int16) - BYTE_BIAS).to(torch.int8)
            return cls(packed.shape, "int8", 0, values.to(device), packed.scales[:rows].clone().to(device))
        return cls(packed.shape, "int4", packed.group, *(part.to(device) for part in _int4(packed)))

    @classmethod
    def view(cls, weight: torch.Tensor) -> DeviceMatrix:
        """A weight [N, K] of torch, not copied. Columns must lie side by side; rows may be apart.

        Raises:
            SettingError: it is no such matrix.
        """
        formats = {dtype: name for name, dtype in FLOATS.items()}
        if weight.dim() != 2 or weight.dtype not in formats or (weight.shape[1] > 1 and weight.stride(1) != 1):
            what = f"{weight.dtype} {tuple(weight.shape)} with strides {weight.stride()}"
            raise bad_setting("weight", what, "a float matrix whose columns lie side by side")
        return cls((weight.shape[0], weight.shape[1]), formats[weight.dtype], 0, weight.detach())

    @property
    def kind(self) -> int:
        """The format's number in the kernels."""
        return KINDS.get(self.format, 0)

    @property
    def stride(self) -> int:
        """Numbers (or bytes) from one row of `values` to the next."""
        return self.values.stride(0)

    @property
    def scale_stride(self) -> int:
        """Scales from one output to the next (int4)."""
        return 0 if self.scales is None or self.scales.dim() == 1 else self.scales.stride(0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(one.nbytes for one in (self.values, self.scales, self.least) if one is not None)

    def bytes_of(self, num_rows: int | None = None, num_cols: int | None = None) -> int:
        """Bytes read by a product with the first `num_rows` outputs and `num_cols` inputs (default: all)."""
        rows = self.shape[0] if num_rows is None else num_rows
        cols = self.shape[1] if num_cols is None else num_cols
        if self.format == "int4":
            return -(-rows // 2) * cols + rows * -(-cols // self.group) * 4
        return rows * cols * self.values.element_size() + (4 * rows if self.scales is not None else 0)

    def unpack(self) -> torch.Tensor:
        """The weights [N, K], float32."""
        if self.format != "int4":
            values = self.values.float()
            return values if self.scales is None else values * self.scales[:, None]
        assert self.scales is not None
        assert self.least is not None
        codes = torch.stack([self.values & 15, self.values >> 4], 1).flatten(0, 1)[: self.shape[0]]
        scale, least = (one.float().repeat_interleave(self.group, 1) for one in (self.scales, self.least))
        return (codes * scale + least)[:, : self.shape[1]]

    def clone(self) -> DeviceMatrix:
        """The same in memory of its own."""
        copies = (None if one is None else one.clone() for one in (self.values, self.scales, self.least))
        return replace(self, **dict(zip(("values", "scales", "least"), copies, strict=True)))  # type: ignore[arg-type]


def pack(weight: torch.Tensor, format: str, group: int = 32, device: torch.device | str = "cpu") -> DeviceMatrix:
    """`kernels.pack`, in the layout of a GPU.

    Raises:
        SettingError: as `kernels.pack`.
    """
    return DeviceMatrix.of(pack_panels(weight, format, group), device)


def _int4(packed: PackedMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and least values."""
    rows, cols = packed.shape
    num, group = len(packed.data), packed.group
    used = -(-cols // group)
    held = packed.data.shape[1] // (4 * LANES + 8 * group)  # groups, those of padding among them
    groups = packed.data.view(num, held, 4 * LANES + 8 * group)
    both = groups[..., : 4 * LANES].contiguous().view(torch.float16).view(num, held, 2, LANES)
    scales, least = (both[:, :used, i].transpose(1, 2).reshape(num * LANES, used)[:rows] for i in (0, 1))
    halves = groups[..., 4 * LANES :].reshape(num, held, group // 8, LANES, 4)
    quads = torch.cat([halves & 15, halves >> 4], 2).view(num, held * group // 4, LANES, 4)
    codes = _from_lanes(quads)[:rows, : used * group]
    if rows % 2:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, 1))
    pairs = codes.view(len(codes) // 2, 2, used * group)
    return pairs[:, 0] | pairs[:, 1] << 4, scales.contiguous(), least.contiguous()


def _from_lanes(values: torch.Tensor) -> torch.Tensor:
    """Panels [P, K / i, 16, i] -> rows [16 * P, K]."""
    return values.permute(0, 2, 1, 3).reshape(len(values) * LANES, values.shape[1] * values.shape[3])


def _quads(data: torch.Tensor) -> tuple[int, int]:
    """Panels, and quads of bytes of one output in each."""
    return data.shape[0], data.shape[1] // (4 * LANES)
