"""Tokens that have grown old move to a body in nibble planes: all layers and heads of a row in one native call.

Its plain twin is `rheostat.runtime.planes.PlaneBody.append` in PyTorch: the same bytes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from rheostat.kernels import structs


def can_settle(body: Any, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether native code can read these tokens [L, K, n, d] for a `rheostat.runtime.planes.PlaneBody`: numbers of the
    body's own format, each head's tokens dense, keys and values laid out alike."""
    dense = (keys.shape[3], 1)
    alike = keys.stride() == values.stride() and keys.dtype == values.dtype == body.dtype
    return alike and keys.stride()[2:] == dense and body.dtype in structs.CACHE_DTYPES


def settle(
    library: ctypes.CDLL, body: Any, row: int, keys: torch.Tensor, values: torch.Tensor, num_tokens: int
) -> None:
    """Quantise whole groups, put them behind what a row has, and move the tokens after them to the front.

    Args:
        body: a `rheostat.runtime.planes.PlaneBody` with room for them; it does not count them yet.
        keys, values: [L, K, n, d], which it `can_settle`.
        num_tokens: of those that are quantised, the first; a multiple of the group size.
    """
    layers, heads, held, dim = keys.shape
    settling = structs.CSettling(
        upper=body.upper.data_ptr(),
        lower=body.lower.data_ptr(),
        scales=body.scales.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        capacity=body.upper.shape[3],
        layer_stride=keys.stride(0),
        head_stride=keys.stride(1),
        num_layers=layers,
        num_rows=body.upper.shape[1],
        num_kv_heads=heads,
        head_dim=dim,
        format=structs.CACHE_DTYPES[body.dtype],
        group=body.group_size,
        value_group=body.value_group_size,
        row=row,
        first_group=int(body.groups[row]),
        num_groups=num_tokens // body.group_size,
        num_left=held - num_tokens,
    )
    library.rheostat_settle(ctypes.byref(settling), torch.get_num_threads())
