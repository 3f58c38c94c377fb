"""The native kernels behind Python functions that check their arguments."""

from __future__ import annotations

import ctypes

import torch

from rheostat.errors import bad_setting
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
