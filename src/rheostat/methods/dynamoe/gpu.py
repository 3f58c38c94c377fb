"""The experts through the Triton kernels, where a GPU and Triton are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rheostat.errors import bad_setting
from rheostat.families import GatedMLP
from rheostat.kernels.build import wants_native
from rheostat.methods.dynamoe.experts import Downs, down_of

if TYPE_CHECKING:
    from rheostat.kernels.triton import NestedWeights

EXECUTIONS = ("auto", "torch", "triton")
"""What runs the experts: Triton for tensors on a GPU where it is installed, else torch; torch; or Triton, which is
refused where it cannot run. `RHEOSTAT_KERNELS=plain` makes `auto` mean torch."""

ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
}
"""Activation modules of transformers and torch -> their names in the kernels."""

_kept: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], NestedWeights]] = WeakKeyDictionary()
"""The host's MLP -> where its weights lay, and the table of those addresses."""


def run(
    x: torch.Tensor, choice: torch.Tensor, mlp: GatedMLP, downs: Downs, sizes: Sequence[int], execution: str = "auto"
) -> torch.Tensor | None:
    """Tokens x [N, D] through the chosen experts [N], -1 giving zeros; None where torch has to do it.

    Weights are read where they are, not copied. Gradients do not flow through the kernels, so a pass that records them
    is torch's.

    Raises:
        SettingError: `execution` is none of `EXECUTIONS`, or Triton was asked for and cannot do this.
    """
    if execution not in EXECUTIONS:
        raise bad_setting("execution", execution, f"one of {', '.join(EXECUTIONS)}")
    if execution == "torch" or (execution == "auto" and (x.device.type != "cuda" or wants_native() is False)):
        return None
    from rheostat.kernels import triton  # nobody without a GPU should pay for this

    if reason := _obstacle(x, mlp, downs, triton.is_available(x.device)):
        if execution == "triton":
            raise bad_setting("execution", execution, f"torch here: {reason}")
        return None
    gate, up = mlp.gate_up(0, sizes[-1])
    parts = [down_of(mlp, downs, e, sizes[e]) for e in (range(len(sizes)) if len(downs) else (len(sizes) - 1,))]
    tensors = (gate, up, *(one for part in parts for one in part if one is not None))
    key = tuple((one.data_ptr(), one.stride(), one.dtype) for one in tensors)
    kept = _kept.get(mlp.host)
    if kept is None or kept[0] != key:  # the table of addresses takes a copy to the GPU: made once
        matrices = [triton.DeviceMatrix.view(weight) for weight, _ in parts]
        biases = [None if bias is None else bias.detach() for _, bias in parts]
        weights = triton.NestedWeights.of(
            triton.DeviceMatrix.view(gate), triton.DeviceMatrix.view(up), matrices, biases, sizes
        )
        kept = _kept[mlp.host] = (key, weights)
    return kept[1].run(x, choice, ACTIVATIONS[type(mlp.act).__name__])


def _obstacle(x: torch.Tensor, mlp: GatedMLP, downs: Downs, is_available: bool) -> str:
    """Why the kernels cannot do this, or nothing."""
    weights: list[Any] = [mlp.down.weight, *mlp.gate_up(0, mlp.ffn_size), *(one.weight for one in downs)]
    if not is_available:
        return f"Triton does not run on {x.device}"
    if torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in weights)):
        return "gradients are recorded"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if type(mlp.act).__name__ not in ACTIVATIONS:
        return f"the activation {type(mlp.act).__name__} is not among the kernels'"
    if any(one.dtype != x.dtype or one.device != x.device or one.data_ptr() % 16 for one in weights):
        return "weights and activations differ in dtype or device"
    return "" if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else f"activations are {x.dtype}"
