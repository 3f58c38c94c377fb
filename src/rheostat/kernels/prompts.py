"""Kernels for prompts, which have many rows: products, nested FFNs, causal attention; in bfloat16.

Each runs native code where it can be built, and its twin in `plain` elsewhere. `NativeReader` puts them together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from rheostat.errors import bad_setting
from rheostat.kernels import plain, structs
from rheostat.kernels.build import library
from rheostat.kernels.native import check_experts, check_floats, pointer
from rheostat.kernels.packed import PackedMatrix

FORMATS = ("bf16", "fp32")
"""What `many_rows` takes."""


def many_rows(x: torch.Tensor, w: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias, by blocks of rows.

    Args:
        x: [M, K] float32; rounded to bfloat16 for bf16 weights.
        w: [N, K], in bf16 or fp32.
        bias: [N] float32.

    Returns:
        [M, N] float32.

    Raises:
        SettingError: shapes, dtypes or the format do not fit.
    """
    if w.format not in FORMATS:
        raise bad_setting("format", w.format, f"one of {', '.join(FORMATS)}")
    if (code := library()) is None:
        return plain.few_rows(x, w, bias=bias)
    x = check_floats("x", x, (None, w.shape[1]))
    bias = None if bias is None else check_floats("bias", bias, (w.shape[0],))
    y = torch.empty(len(x), w.shape[0])
    if y.numel():
        code.rheostat_many_rows(
            ctypes.byref(w.descriptor()), pointer(x), len(x), pointer(bias), pointer(y), torch.get_num_threads()
        )
    return y


def grouped_ffn(
    x: torch.Tensor,
    gate: PackedMatrix,
    up: PackedMatrix,
    downs: Sequence[PackedMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    experts: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """As `rheostat.kernels.nested_ffn`, for many rows and matrices in bf16.

    Raises:
        SettingError: shapes, dtypes, formats or experts do not fit.
    """
    if any(one.format != "bf16" for one in (gate, up, *downs)):
        raise bad_setting("format", sorted({one.format for one in (gate, up, *downs)}), "bf16")
    if (code := library()) is None:
        return plain.nested_ffn(x, gate, up, downs, biases, sizes, experts, activation)
    keep = structs.Keep()
    ffn = structs.make_ffn(keep, gate, up, downs, biases, sizes, activation)
    x = check_floats("x", x, (None, gate.shape[1]))
    experts = check_experts(experts, len(x), len(sizes))
    y = torch.empty(len(x), downs[0].shape[0])
    if y.numel():
        code.rheostat_grouped_ffn(
            ctypes.byref(ffn), pointer(x), pointer(experts), len(x), pointer(y), torch.get_num_threads()
        )
    return y


def causal_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, window: int = 0
) -> torch.Tensor:
    """Attention of a text's last T tokens, each to itself and what is before it.

    Args:
        q: [H, T, d] float32; rounded to bfloat16, as keys and values are.
        keys, values: [K, S, d] float32 of all S >= T tokens; H is a multiple of K.
        scale: what scores are multiplied with.
        window: a token sees itself and the `window - 1` before it; 0 is no limit.

    Returns:
        [H, T, d] float32.

    Raises:
        SettingError: shapes or dtypes do not fit.
    """
    keys = check_floats("keys", keys, (None, None, None))
    values = check_floats("values", values, tuple(keys.shape))
    q = check_floats("q", q, (None, None, keys.shape[2]))
    structs.check_attention(q.shape[0], keys.shape[0], keys.shape[2], keys.dtype)
    if q.shape[1] > keys.shape[1] or window < 0:
        raise bad_setting("q, window", (tuple(q.shape), window), f"at most {keys.shape[1]} tokens, a window from 0")
    if (code := library()) is None:
        return plain.causal_attention(q, keys, values, scale=scale, window=window)
    out = torch.empty_like(q)
    if out.numel():
        code.rheostat_causal_attention(
            pointer(q),
            pointer(keys),
            pointer(values),
            q.shape[0],
            keys.shape[0],
            keys.shape[2],
            q.shape[1],
            keys.shape[1],
            ctypes.c_float(scale),
            window,
            pointer(out),
            torch.get_num_threads(),
        )
    return out
