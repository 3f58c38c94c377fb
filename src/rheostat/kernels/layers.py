"""One layer of a decoder as the native code takes it."""

from __future__ import annotations

from typing import Any

from rheostat.errors import bad_setting
from rheostat.kernels import structs
from rheostat.kernels.packed import CMatrix, PackedMatrix, pack

RULES = ("damage", "confidence")


def describe_layer(keep: structs.Keep, layer: Any, activation: str) -> structs.CLayer:
    """The structure of a `rheostat.runtime.weights.LayerWeights` with packed matrices.

    Raises:
        SettingError: something that the native code cannot do.
    """
    ffn = layer.ffn
    heads = {name: packed(name, getattr(layer, name)) for name in ("q", "k", "v", "o")}
    if len({(one.format, one.group) for name, one in heads.items() if name != "o"}) > 1:
        raise bad_setting("q, k, v", {name: one.format for name, one in heads.items()}, "of one format")
    gate, up = packed("gate", ffn.gate), packed("up", ffn.up)
    downs = [packed("down", down) for down in ffn.downs]
    names = ("q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
    return structs.CLayer(
        keep.floats(layer.input_norm),
        keep.floats(layer.post_norm),
        *(keep.matrix(one) for one in heads.values()),
        *(keep.floats(getattr(layer, name)) for name in names),
        structs.make_ffn(keep, gate, up, downs, ffn.down_biases, ffn.sizes, activation),
        describe_router(keep, ffn.router),
        int(layer.has_rope),
        layer.window,
    )


def describe_router(keep: structs.Keep, router: Any) -> structs.CRouter:
    """The structure of a `rheostat.runtime.weights.RouterWeights`, or of none.

    Raises:
        SettingError: its rule is not one of `RULES`.
    """
    if router is None:
        return structs.CRouter(CMatrix(), None, None, None, 0, 0, 0)
    if router.rule not in RULES:
        raise bad_setting("rule", router.rule, f"one of {', '.join(RULES)}")
    return structs.CRouter(
        keep.matrix(pack(router.inner, "fp32")),
        keep.floats(router.inner_bias),
        keep.floats(router.outer),
        keep.floats(router.outer_bias),
        router.inner.shape[0],
        router.outer.shape[0],
        int(router.rule == "confidence"),
    )


def packed(name: str, matrix: Any) -> PackedMatrix:
    """The matrix, which must be packed.

    Raises:
        SettingError: it is not.
    """
    if not isinstance(matrix, PackedMatrix):
        raise bad_setting(name, type(matrix).__name__, "a packed matrix")
    return matrix
