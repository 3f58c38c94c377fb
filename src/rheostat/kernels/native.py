"""The native kernels behind Python functions that check their arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from rheostat.errors import bad_setting
from rheostat.kernels import structs
from rheostat.kernels.packed import PackedMatrix

MAX_ROWS = 4096
"""Rows of one call; more are for a matrix product."""


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's values lie."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def check_floats(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> torch.Tensor:
    """The tensor, contiguous; it must be float32 on the CPU and of this shape (None: any size).

    Raises:
        SettingError: it is not.
    """
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise bad_setting(
            name, f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}", f"float32 [{wanted}] on the CPU"
        )
    return tensor.detach().contiguous()


def few_rows(
    library: ctypes.CDLL,
    x: torch.Tensor,
    w: PackedMatrix,
    start: int = 0,
    stop: int | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rheostat.kernels.few_rows`."""
    stop = w.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= w.shape[0]:
        raise bad_setting("start, stop", (start, stop), f"a slice of {w.shape[0]} outputs")
    x = check_floats("x", x, (None, w.shape[1]))
    shape = (len(x), stop - start)
    if bias is not None:
        bias = check_floats("bias", bias, shape[1:])
    if len(x) > MAX_ROWS:
        raise bad_setting("x", tuple(x.shape), f"of at most {MAX_ROWS} rows")
    y = check_out(out, shape)
    if y.numel():
        library.rheostat_few_rows(
            ctypes.byref(w.descriptor()),
            pointer(x),
            ctypes.c_int64(x.shape[1]),
            len(x),
            start,
            stop,
            pointer(bias),
            pointer(y),
            ctypes.c_int64(shape[1]),
            torch.get_num_threads(),
        )
    return y


def check_out(out: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """Where results go: fresh memory, or `out`, which must be contiguous.

    Raises:
        SettingError: it cannot take them.
    """
    if out is None:
        return torch.empty(shape)
    check_floats("out", out, shape)
    if not out.is_contiguous():
        raise bad_setting("out", tuple(out.stride()), "contiguous")
    return out


def nested_ffn(
    library: ctypes.CDLL,
    x: torch.Tensor,
    gate: PackedMatrix,
    up: PackedMatrix,
    downs: Sequence[PackedMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    experts: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """See `rheostat.kernels.nested_ffn`."""
    keep = structs.Keep()
    ffn = structs.make_ffn(keep, gate, up, downs, biases, sizes, activation)
    x = check_floats("x", x, (None, gate.shape[1]))
    experts = check_experts(experts, len(x), len(sizes))
    y = torch.empty(len(x), downs[0].shape[0])
    if y.numel():
        library.rheostat_nested_ffn(
            ctypes.byref(ffn), pointer(x), pointer(experts), len(x), pointer(y), torch.get_num_threads()
        )
    return y


def check_experts(experts: torch.Tensor, num_rows: int, num_experts: int) -> torch.Tensor:
    """The experts as int32.

    Raises:
        SettingError: not one a row, or out of range.
    """
    if experts.shape != (num_rows,) or bool(((experts < -1) | (experts >= num_experts)).any()):
        raise bad_setting("experts", experts.tolist(), f"{num_rows} numbers from -1 to {num_experts - 1}")
    return experts.to(torch.int32).contiguous()


def decode_attention(
    library: ctypes.CDLL,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """See `rheostat.kernels.decode_attention`."""
    num_rows, num_kv_heads, num_slots, head_dim = check_cache(keys, values)
    q = check_floats("q", q, (num_rows, None, head_dim))
    structs.check_attention(q.shape[1], num_kv_heads, head_dim, keys.dtype)
    lengths, starts = (check_slots(name, one, num_rows) for name, one in (("lengths", lengths), ("starts", starts)))
    if num_rows and not bool(((starts >= 0) & (starts <= lengths) & (lengths <= num_slots)).all()):
        raise bad_setting("starts, lengths", (starts.tolist(), lengths.tolist()), f"rising, within {num_slots} slots")
    out = torch.empty_like(q)
    format = structs.CACHE_DTYPES[keys.dtype]
    shape = structs.CAttention(q.shape[1], num_kv_heads, head_dim, format, num_slots, scale, softcap)
    if out.numel():
        library.rheostat_attention(
            ctypes.byref(shape),
            *(pointer(one) for one in (q, keys, values, lengths, starts)),
            window,
            num_rows,
            pointer(out),
            torch.get_num_threads(),
        )
    return out


def check_cache(keys: torch.Tensor, values: torch.Tensor) -> torch.Size:
    """The shape [B, K, S, d] of a cache.

    Raises:
        SettingError: keys and values are not contiguous, not alike, or not on the CPU.
    """
    alike = keys.shape == values.shape and keys.dtype == values.dtype
    if keys.dim() != 4 or not alike or keys.device.type != "cpu" or values.device.type != "cpu":
        raise bad_setting("keys, values", (tuple(keys.shape), tuple(values.shape)), "alike, [B, K, S, d] on the CPU")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise bad_setting("keys, values", (keys.stride(), values.stride()), "contiguous")
    return keys.shape


def check_slots(name: str, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """One whole number a row, as int32.

    Raises:
        SettingError: it is not.
    """
    if tensor.shape != (num_rows,) or tensor.is_floating_point():
        raise bad_setting(name, tensor.tolist(), f"{num_rows} whole numbers")
    return tensor.to(torch.int32).contiguous()
