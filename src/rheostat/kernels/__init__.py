"""Kernels for decoding on a CPU: products of few rows with packed weights, nested FFNs, attention over a cache.

Each function here runs native code where it can be built, and its twin in `plain` elsewhere (`build` says when).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rheostat.kernels import native, plain
from rheostat.kernels.ahead import NativeAhead
from rheostat.kernels.build import library
from rheostat.kernels.decoder import NativeDecoder
from rheostat.kernels.packed import FORMATS, PackedMatrix, pack
from rheostat.kernels.reader import NativeReader, reads_prompts

__all__ = [
    "FORMATS",
    "NativeAhead",
    "NativeDecoder",
    "NativeReader",
    "PackedMatrix",
    "decode_attention",
    "few_rows",
    "library",
    "nested_ffn",
    "pack",
    "reads_prompts",
]


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


def nested_ffn(
    x: torch.Tensor,
    gate: PackedMatrix,
    up: PackedMatrix,
    downs: Sequence[PackedMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    experts: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """A gated FFN whose experts are prefixes of its channels: y = down(act(gate x) * up x), width by row.

    Args:
        x: [M, D] float32.
        gate, up: [F, D], of one format.
        downs: one [D, F], of which each expert takes its first columns; or one [D, sizes[e]] an expert.
        biases: [D] or None, of each of `downs`.
        sizes: channels of each expert, rising; the last is F.
        experts: [M] whole numbers; -1 gives zeros.
        activation: one of `structs.ACTIVATIONS`.

    Returns:
        [M, D] float32.

    Raises:
        SettingError: shapes, dtypes or experts do not fit, or an expert's edge lies inside an int4 group.
    """
    if (code := library()) is None:
        return plain.nested_ffn(x, gate, up, downs, biases, sizes, experts, activation)
    return native.nested_ffn(code, x, gate, up, downs, biases, sizes, experts, activation)


def decode_attention(
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
    """Attention of one token a row over its cache; query heads share the key/value head of their group.

    Args:
        q: [B, H, d] float32.
        keys, values: [B, K, S, d] float32, bfloat16 or float16, contiguous; H is a multiple of K.
        lengths: [B], slots filled, the token's own among them.
        starts: [B], first slot that is not padding.
        scale: what scores are multiplied with.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        window: only the last `window` slots are seen; 0 is no limit.

    Returns:
        [B, H, d] float32; zeros for a row that sees no slot.

    Raises:
        SettingError: shapes, dtypes or slots do not fit.
    """
    if (code := library()) is None:
        return plain.decode_attention(q, keys, values, lengths, starts, scale=scale, softcap=softcap, window=window)
    return native.decode_attention(code, q, keys, values, lengths, starts, scale=scale, softcap=softcap, window=window)
