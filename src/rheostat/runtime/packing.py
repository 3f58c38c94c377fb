"""The large matrices of a decoder in the form that one phase likes best.

Decoding streams every weight once for a few rows, so there bytes count: panels in 32, 16, 8 or 4 bits. A prompt
multiplies each weight with hundreds of rows, so there the matrix unit counts: plain tensors in bfloat16 (or float32).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from rheostat.errors import SettingError, bad_setting
from rheostat.kernels import FORMATS, NativeAhead, NativeReader, pack
from rheostat.runtime.building import Unsupported
from rheostat.runtime.weights import DecoderWeights, DraftForm, FFNWeights, LayerWeights, Matrix, PredictedLayers

AUTO = "auto"

GROUP = 32
"""Inputs that share a scale in int4."""

MIXED = "mixed"
"""4 bits for matrices that lose no more by it than by 8, as those of a file in 4 bits do; 8 bits for the others."""

JUDGED = 64
"""Rows of each matrix by which `mixed` judges."""

WEIGHTS = (AUTO, *FORMATS, MIXED)
"""What `weights` may be; `auto` is the format of the model's own dtype."""

OF_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def check_format(weights: str, dtype: torch.dtype) -> str:
    """The format that `weights` asks for, for a model of this dtype.

    Raises:
        SettingError: there is no such format.
        Unsupported: no format is that of the model's dtype.
    """
    if weights not in WEIGHTS:
        raise bad_setting("weights", weights, f"one of {', '.join(WEIGHTS)}")
    if weights == AUTO and dtype not in OF_DTYPE:
        raise Unsupported(f"weights in {str(dtype).removeprefix('torch.')}")
    return OF_DTYPE[dtype] if weights == AUTO else weights


def decode_form(weights: DecoderWeights, format: str, *, is_packed: bool = True) -> DecoderWeights:
    """The decoder with all matrices that a step streams packed as `format`; rows of the embedding are looked up as
    they are.

    Args:
        is_packed: False gives the same numbers as plain float32 tensors, for the plain step.

    Raises:
        Unsupported: the weights cannot be held in this format.
    """

    def convert(*together: Matrix, edges: tuple[int, ...] = ()) -> tuple[Matrix, ...]:
        one = mixed_format(*together, edges=edges) if format == MIXED else format
        packed = tuple(pack(matrix, one, GROUP) for matrix in together)
        return packed if is_packed else tuple(matrix.unpack() for matrix in packed)

    try:
        layers = tuple(_converted_layer(layer, convert) for layer in weights.layers)
        found = replace(weights, layers=layers, head=convert(weights.head)[0])
    except SettingError as error:
        raise Unsupported(f"{format} for these weights ({error})") from None
    return found


def mixed_format(*together: Matrix, edges: tuple[int, ...] = ()) -> str:
    """The format that `mixed` gives to matrices that native code wants alike: `int4` where none loses more by it than
    by `int8`, and no group would straddle one of `edges`."""
    judged = [one[:: max(1, one.shape[0] // JUDGED)] for one in together if isinstance(one, torch.Tensor)]
    fits = all(edge % GROUP == 0 for edge in edges) and all(_loss(one, "int4") <= _loss(one, "int8") for one in judged)
    return "int4" if fits else "int8"


def _loss(weight: torch.Tensor, format: str) -> float:
    return float((pack(weight, format, GROUP).unpack() - weight.float()).square().sum())


def draft_form(
    weights: DecoderWeights, decode: DecoderWeights, form: DraftForm, *, is_packed: bool = True
) -> DecoderWeights:
    """The decoder as a draft reads it: what `form` names in 4 bits, the rest shared with the decode form.

    Raises:
        Unsupported: the weights cannot be held in 4 bits.
    """
    check_edges(weights.layers[0].ffn.sizes, "int4")
    places = {"ffn": ("gate", "up", "downs"), "attention": ("q", "k", "v", "o")}
    named = {name for place in form.places for name in places.get(place, ())}

    def convert(matrix: Matrix) -> Matrix:
        packed = pack(matrix, "int4", GROUP)
        return packed if is_packed else packed.unpack()

    layers = []
    for full, other in zip(weights.layers, decode.layers, strict=True):
        own = {name: convert(getattr(full, name)) for name in places["attention"] if name in named}
        ffn: dict[str, Any] = {name: convert(getattr(full.ffn, name)) for name in ("gate", "up") if name in named}
        if "downs" in named:
            ffn["downs"] = tuple(convert(down) for down in full.ffn.downs)
        layers.append(replace(other, **own, ffn=replace(other.ffn, **ffn)))
    head = convert(weights.head) if "head" in form.places else decode.head
    return replace(decode, layers=tuple(layers), head=head)


def check_edges(sizes: tuple[int, ...], format: str) -> None:
    """Refuse experts whose edge lies inside a group of channels that share a scale.

    Raises:
        Unsupported: one does.
    """
    if format == "int4" and any(size % GROUP for size in sizes[:-1]):
        raise Unsupported(f"{format} for experts that are no multiples of {GROUP} channels")


def prefill_form(weights: DecoderWeights, dtype: torch.dtype) -> DecoderWeights:
    """The decoder with its layers' matrices in `dtype`; those that are already are not copied. The head, which sees
    one token a row, stays as it is."""
    layers = tuple(_mapped_layer(layer, lambda matrix: matrix.to(dtype)) for layer in weights.layers)
    return replace(weights, layers=layers)


def native_prefill_form(
    weights: DecoderWeights, code: ctypes.CDLL, decode: DecoderWeights | None = None
) -> DecoderWeights:
    """The decoder as native code reads prompts with it: matrices in panels of bfloat16, the head's too.

    Args:
        decode: a form in bf16 whose panels serve both phases; None makes panels for this one.
    """
    if decode is None:
        layers = tuple(_mapped_layer(layer, lambda matrix: pack(matrix, "bf16")) for layer in weights.layers)
        decode = replace(weights, layers=layers, head=pack(weights.head, "bf16"))
    return replace(decode, reader=NativeReader(code, decode))


def ahead_form(layers: PredictedLayers, dtype: torch.dtype) -> PredictedLayers:
    """Maps with their matrices in `dtype`, those of all layers one below the other, for a single product."""
    squeeze = None if layers.squeeze is None else layers.squeeze.to(dtype)
    maps, biases, firsts = (torch.cat(list(one)) for one in (layers.maps, layers.biases, layers.firsts))
    return replace(layers, squeeze=squeeze, maps=(maps.to(dtype),), biases=(biases.to(dtype),), firsts=(firsts,))


def native_ahead_form(layers: PredictedLayers, reader: NativeReader) -> PredictedLayers:
    """Maps as native code reads prompts with them: panels of bfloat16."""
    native = NativeAhead(reader, layers)
    return replace(layers, squeeze=native.squeeze, maps=(native.maps,), reader=native)


def ahead_bytes(layers: PredictedLayers, others: PredictedLayers) -> int:
    """Bytes of the matrices of `layers` that are not those of `others`."""
    shared = {_place(one) for one in others.matrices}
    return sum(one.nbytes for one in layers.matrices if _place(one) not in shared)


def prefill_dtype(format: str) -> torch.dtype:
    """What to read prompts in: float32 for float32 weights; else bfloat16 where the processor multiplies it."""
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if format != "fp32" and has_bf16 else torch.float32


def matrices(weights: DecoderWeights) -> Iterator[Matrix]:
    """All matrices, the head last; the embedding only where it is not the head."""
    for layer in weights.layers:
        yield from (layer.q, layer.k, layer.v, layer.o, layer.ffn.gate, layer.ffn.up, *layer.ffn.downs)
    if weights.embedding is not weights.head:
        yield weights.embedding
    yield weights.head


def own_bytes(weights: DecoderWeights, *others: DecoderWeights) -> int:
    """Bytes of the matrices of `weights` that are not those of one of `others` too."""
    shared = {_place(matrix) for other in others for matrix in matrices(other)}
    return sum({_place(one): one.nbytes for one in matrices(weights) if _place(one) not in shared}.values())


def _place(matrix: Matrix) -> int:
    return int((matrix if isinstance(matrix, torch.Tensor) else matrix.data).data_ptr())


def _converted_layer(layer: LayerWeights, convert: Callable[..., tuple[Matrix, ...]]) -> LayerWeights:
    q, k, v = convert(layer.q, layer.k, layer.v)
    gate, up = convert(layer.ffn.gate, layer.ffn.up)
    edges = layer.ffn.sizes[:-1] if len(layer.ffn.downs) == 1 else ()  # others have a matrix of their own
    ffn: FFNWeights = replace(layer.ffn, gate=gate, up=up, downs=convert(*layer.ffn.downs, edges=edges))
    return replace(layer, q=q, k=k, v=v, o=convert(layer.o)[0], ffn=ffn)


def _mapped_layer(layer: LayerWeights, convert: Callable[[Matrix], Matrix]) -> LayerWeights:
    ffn: FFNWeights = replace(
        layer.ffn,
        gate=convert(layer.ffn.gate),
        up=convert(layer.ffn.up),
        downs=tuple(convert(down) for down in layer.ffn.downs),
    )
    q, k, v, o = (convert(matrix) for matrix in (layer.q, layer.k, layer.v, layer.o))
    return replace(layer, q=q, k=k, v=v, o=o, ffn=ffn)
