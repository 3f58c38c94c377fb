"""The structures of `native/*.h`, field by field, and how they are filled."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.packed import CMatrix, PackedMatrix, check_edges

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
"""Name -> its number in `native/simd.h`."""

CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

MAX_HEAD_DIM = 256

_int, _long, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CFfn(ctypes.Structure):
    """`Ffn` of native/ffn.h."""

    _fields_ = (
        ("gate", CMatrix),
        ("up", CMatrix),
        ("downs", _pointer),
        ("down_biases", _pointer),
        ("sizes", _pointer),
        ("num_experts", _int),
        ("num_downs", _int),
        ("activation", _int),
    )


class CAttention(ctypes.Structure):
    """`Attention` of native/attention.h."""

    _fields_ = (
        ("num_heads", _int),
        ("num_kv_heads", _int),
        ("head_dim", _int),
        ("cache_format", _int),
        ("num_slots", _long),
        ("scale", _float),
        ("softcap", _float),
    )


class CRouter(ctypes.Structure):
    """`Router` of native/decoder.h."""

    _fields_ = (
        ("inner", CMatrix),
        ("inner_bias", _pointer),
        ("outer", _pointer),
        ("outer_bias", _pointer),
        ("width", _int),
        ("num_outputs", _int),
        ("is_confidence", _int),
    )


class CLayer(ctypes.Structure):
    """`Layer` of native/decoder.h."""

    _fields_ = (
        ("input_norm", _pointer),
        ("post_norm", _pointer),
        ("q", CMatrix),
        ("k", CMatrix),
        ("v", CMatrix),
        ("o", CMatrix),
        ("q_bias", _pointer),
        ("k_bias", _pointer),
        ("v_bias", _pointer),
        ("o_bias", _pointer),
        ("q_norm", _pointer),
        ("k_norm", _pointer),
        ("ffn", CFfn),
        ("router", CRouter),
        ("has_rope", _int),
        ("window", _int),
    )


class CDecoder(ctypes.Structure):
    """`Decoder` of native/decoder.h."""

    _fields_ = (
        ("layers", _pointer),
        ("num_layers", _int),
        ("hidden_size", _int),
        ("rope_half", _int),
        ("eps", _float),
        ("final_norm", _pointer),
        ("head", CMatrix),
        ("attention", CAttention),
    )


class CPlanes(ctypes.Structure):
    """`Planes` of native/planes.h."""

    _fields_ = (
        ("upper", _pointer),
        ("lower", _pointer),
        ("scales", _pointer),
        ("groups", _pointer),
        ("capacity", _long),
        ("group", _int),
        ("value_group", _int),
        ("bits", _int),
        ("num_rows", _int),
    )


class CNewTokens(ctypes.Structure):
    """`NewTokens` of native/verify.h."""

    _fields_ = (
        ("lengths", _pointer),
        ("starts", _pointer),
        ("firsts", _pointer),
        ("body", _pointer),
        ("num_cached", _int),
    )


class CStep(ctypes.Structure):
    """`Step` of native/decoder.h."""

    _fields_ = (
        ("hidden", _pointer),
        ("positions", _pointer),
        ("settings", _pointer),
        ("tokens", CNewTokens),
        ("keys", _pointer),
        ("values", _pointer),
        ("layer_stride", _long),
        ("cos", _pointer),
        ("sin", _pointer),
        ("logits", _pointer),
        ("experts", _pointer),
        ("num_rows", _int),
    )


class CDraft(ctypes.Structure):
    """`Draft` of native/draft.h."""

    _fields_ = (
        ("table", _pointer),
        ("table_stride", _long),
        ("table_format", _int),
        ("num_tokens", _int),
        ("token_ids", _pointer),
    )


class CSettling(ctypes.Structure):
    """`Settling` of native/settle.h."""

    _fields_ = (
        ("upper", _pointer),
        ("lower", _pointer),
        ("scales", _pointer),
        ("keys", _pointer),
        ("values", _pointer),
        ("capacity", _long),
        ("layer_stride", _long),
        ("head_stride", _long),
        ("num_layers", _int),
        ("num_rows", _int),
        ("num_kv_heads", _int),
        ("head_dim", _int),
        ("format", _int),
        ("group", _int),
        ("value_group", _int),
        ("row", _int),
        ("first_group", _int),
        ("num_groups", _int),
        ("num_left", _int),
    )


class CReading(ctypes.Structure):
    """`Reading` of native/reader.h."""

    _fields_ = (
        ("hidden", _pointer),
        ("positions", _pointer),
        ("settings", _pointer),
        ("lengths", _pointer),
        ("pasts", _pointer),
        ("rows", _pointer),
        ("keys", _pointer),
        ("values", _pointer),
        ("layer_stride", _long),
        ("cos", _pointer),
        ("sin", _pointer),
        ("experts", _pointer),
        ("num_rows", _int),
        ("num_tokens", _int),
        ("first_layer", _int),
        ("last_layer", _int),
    )


class CPredicted(ctypes.Structure):
    """`Predicted` of native/ahead.h."""

    _fields_ = (
        ("reads", _pointer),
        ("columns", _pointer),
        ("is_other", _pointer),
        ("others", _pointer),
        ("is_early", _pointer),
        ("bias", _pointer),
        ("firsts", _pointer),
        ("squeeze", CMatrix),
        ("maps", CMatrix),
        ("num_reads", _int),
        ("has_squeeze", _int),
    )


class Keep:
    """Holds on to what structures point at."""

    def __init__(self) -> None:
        self.alive: list[Any] = []

    def floats(self, tensor: torch.Tensor | None) -> int | None:
        """Address of the tensor's values as contiguous float32, or None."""
        if tensor is None:
            return None
        ready = tensor.detach().float().contiguous()
        self.alive.append(ready)
        return ready.data_ptr()

    def matrix(self, matrix: PackedMatrix) -> CMatrix:
        """The matrix's structure."""
        self.alive.append(matrix)
        return matrix.descriptor()

    def array(self, kind: Any, values: Sequence[Any]) -> int:
        """Address of an array of a C type."""
        made = (kind * len(values))(*values)
        self.alive.append(made)
        return ctypes.addressof(made)


def make_ffn(
    keep: Keep,
    gate: PackedMatrix,
    up: PackedMatrix,
    downs: Sequence[PackedMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    activation: str,
) -> CFfn:
    """The structure of a nested FFN; `rheostat.kernels.nested_ffn` says what the arguments are.

    Raises:
        SettingError: they do not fit together.
    """
    check_ffn(gate, up, downs, biases, sizes, activation)
    return CFfn(
        keep.matrix(gate),
        keep.matrix(up),
        keep.array(CMatrix, [keep.matrix(down) for down in downs]),
        keep.array(_pointer, [keep.floats(bias) for bias in biases]),
        keep.array(_int, sizes),
        len(sizes),
        len(downs),
        ACTIVATIONS[activation],
    )


def check_ffn(
    gate: PackedMatrix,
    up: PackedMatrix,
    downs: Sequence[PackedMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    activation: str,
) -> None:
    """Refuse matrices that are no nested FFN.

    Raises:
        SettingError: they are not.
    """
    if activation not in ACTIVATIONS:
        raise bad_setting("activation", activation, f"one of {', '.join(ACTIVATIONS)}")
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise bad_setting("sizes", tuple(sizes), "rising numbers of channels")
    if gate.shape != up.shape or gate.shape[0] != sizes[-1] or (gate.format, gate.group) != (up.format, up.group):
        raise bad_setting("gate, up", (gate.shape, up.shape), f"alike, with {sizes[-1]} outputs")
    if len(downs) not in (1, len(sizes)) or len(biases) != len(downs):
        raise bad_setting("downs", len(downs), f"1 or {len(sizes)}, each with a bias or None")
    wanted = [sizes[-1]] if len(downs) == 1 else list(sizes)
    width = downs[0].shape[0]
    if any(
        down.shape != (width, size) or down.format != downs[0].format for down, size in zip(downs, wanted, strict=True)
    ):
        raise bad_setting("downs", [down.shape for down in downs], f"of one format, with inputs {wanted}")
    if any(bias is not None and tuple(bias.shape) != (width,) for bias in biases):
        raise bad_setting("biases", [None if b is None else tuple(b.shape) for b in biases], f"of shape ({width},)")
    if len(downs) == 1:
        check_edges(tuple(sizes), downs[0])


def check_attention(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Refuse heads and caches that the attention kernel cannot read.

    Raises:
        SettingError: it cannot.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise bad_setting("heads", (num_heads, num_kv_heads), "a multiple of the key/value heads")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise bad_setting("head_dim", head_dim, f"from 1 to {MAX_HEAD_DIM}")
    if dtype not in CACHE_DTYPES:
        raise bad_setting("cache dtype", str(dtype), ", ".join(str(one) for one in CACHE_DTYPES))


def planes_of(cache: Any) -> CPlanes | None:
    """The structure of what a cache holds in nibble planes; None where it has none."""
    body = cache.body
    if body is None:
        return None
    lower = None if body.bits == 4 else body.lower.data_ptr()  # a draft that read it would crash
    return CPlanes(
        body.upper.data_ptr(),
        lower,
        body.scales.data_ptr(),
        body.groups.data_ptr(),
        body.upper.shape[3],
        body.group_size,
        body.value_group_size,
        body.bits,
        body.upper.shape[1],
    )
