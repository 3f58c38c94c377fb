"""Triton where it is installed, and what all kernels here share: products, activations, and a tile of a matrix.

Triton is optional. Without it these modules can be imported and say what is missing when a kernel is asked for
(`check_device`). Where `TRITON_INTERPRET=1` was set before Triton was imported (torch may do that), kernels run on CPU
tensors in its interpreter: slowly, to check them where there is no GPU.

A kernel's parameters have no types that Python could check: pointers and integers come from the launch, names in
capitals are constants of the compiled kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.structs import ACTIVATIONS

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = None

IS_INTERPRETED = triton is not None and not isinstance(tl.sigmoid, triton.JITFunction)
"""Whether kernels run in Triton's interpreter: its own functions show what it was imported for."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What activations may be."""


def jit(kernel: Any) -> Any:
    """`triton.jit`, or the function itself where there is no Triton to run it."""
    return kernel if triton is None else triton.jit(kernel)


def constant(value: Any) -> Any:
    """A number of this module that kernels may read."""
    return value if tl is None else tl.constexpr(value)


def dtype_of(dtype: torch.dtype) -> Any:
    """Triton's name for a dtype of torch."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def is_available(device: torch.device) -> bool:
    """Whether kernels run on this device: CUDA with Triton installed, or a CPU under Triton's interpreter."""
    return triton is not None and (device.type == "cpu" if IS_INTERPRETED else device.type == "cuda")


def check_device(device: torch.device) -> None:
    """Refuse a device on which kernels do not run.

    Raises:
        SettingError: says what is missing.
    """
    if triton is None:
        raise bad_setting("kernels", "triton", "installed: pip install 'rheostat[gpu]'")
    if not is_available(device):
        allowed = "cpu under TRITON_INTERPRET=1" if IS_INTERPRETED else "cuda (or cpu with TRITON_INTERPRET=1 set)"
        raise bad_setting("device", str(device), allowed)


def next_power(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return max(least, 1 << max(0, number - 1).bit_length())


INTERPRETED = constant(IS_INTERPRETED)
KINDS = {"int8": 1, "int4": 2}
"""Format -> its number in the kernels; all others are 0."""

INT8, INT4 = constant(KINDS["int8"]), constant(KINDS["int4"])
SILU, GELU_TANH, GELU, RELU = (constant(ACTIVATIONS[name]) for name in ("silu", "gelu_tanh", "gelu", "relu"))


@jit
def dot(a, b, acc):
    """acc + a b, summed in float32."""
    if INTERPRETED:  # its products take bfloat16 for whole numbers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def activate(x, NAME: tl.constexpr):
    """One of `structs.ACTIVATIONS`, by its number."""
    if NAME == SILU:
        y = x * tl.sigmoid(x)
    elif NAME == GELU_TANH:
        y = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == GELU:
        y = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    else:
        y = tl.maximum(x, 0.0)
    return y


@jit
def load_tile(
    values, scales, least, stride, scale_stride, n, n_mask, first, inputs,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Weights [BN, BK] of outputs n and inputs first .. first + BK, in DTYPE; zero beyond the matrix.

    int8 comes without its scale, which `load_scale` has for the end of the sum. For int4, `first` is where a group
    begins and BK is a multiple of it.
    """
    k = first + tl.arange(0, BK)
    mask = n_mask[:, None] & (k < inputs)[None, :]
    if FORMAT == INT4:  # byte i of a column holds outputs 2i (low half) and 2i + 1
        place = (n // 2).to(tl.int64)
        byte = tl.load(values + place[:, None] * stride + k[None, :], mask=mask, other=0).to(tl.int32)
        code = (byte >> ((n % 2) * 4)[:, None]) & 15
        group = first // GROUP + tl.arange(0, BK // GROUP)
        here = n.to(tl.int64)[:, None] * scale_stride + group[None, :]
        known = n_mask[:, None] & (group * GROUP < inputs)[None, :]
        scale = tl.load(scales + here, mask=known, other=0.0).to(tl.float32)
        low = tl.load(least + here, mask=known, other=0.0).to(tl.float32)
        code = tl.reshape(code.to(tl.float32), (BN, BK // GROUP, GROUP))
        tile = tl.reshape(code * scale[:, :, None] + low[:, :, None], (BN, BK)).to(DTYPE)
    else:
        tile = tl.load(values + n.to(tl.int64)[:, None] * stride + k[None, :], mask=mask, other=0)
        if FORMAT == INT8:
            tile = tile.to(tl.float32)
        tile = tile.to(DTYPE)
    return tile


@jit
def load_scale(scales, n, n_mask, FORMAT: tl.constexpr, BN: tl.constexpr):
    """What sums of outputs n are multiplied with: the scales [BN] of int8, else ones."""
    scale = tl.full((BN,), 1.0, tl.float32)
    if FORMAT == INT8:
        scale = tl.load(scales + n, mask=n_mask, other=0.0)
    return scale
