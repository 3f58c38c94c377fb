"""Kernels for decoding on a CPU: products of few rows with packed weights, nested FFNs, attention over a cache.

Each function here runs native code where it can be built, and its twin in `plain` elsewhere (`build` says when).
"""

from __future__ import annotations

import torch

from rheostat.kernels import native, plain
from rheostat.kernels.build import library
from rheostat.kernels.packed import FORMATS, PackedMatrix, pack

__all__ = ["FORMATS", "PackedMatrix", "few_rows", "library", "pack"]


def few_rows(
    x: torch.Tensor,
    w: PackedMatrix,
    start: int = 0,
    stop: int | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W[start:stop]^T + bias, reading the weights once for all rows.

    Args:
        x: [M, K] float32. Activations are rounded to bfloat16 for bf16 weights where the processor multiplies those,
            and to bytes with a scale for each 32 of them for int8 and int4; sums are float32.
        w: [N, K].
        bias: [stop - start] float32.
        out: [M, stop - start] float32, contiguous; written to and returned.

    Returns:
        [M, stop - start] float32.

    Raises:
        SettingError: shapes, dtypes or the slice do not fit.
    """
    if (code := library()) is None:
        return plain.few_rows(x, w, start, stop, bias, out)
    return native.few_rows(code, x, w, start, stop, bias, out)
