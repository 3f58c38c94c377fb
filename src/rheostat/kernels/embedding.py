"""Rows of an embedding, looked up without torch.

An operation of torch over many numbers wakes its threads, which then spin for milliseconds on the cores that native
code needs next.
"""

from __future__ import annotations

import ctypes

import torch

from rheostat.kernels import structs


def can_look_up(table: torch.Tensor) -> bool:
    """Whether native code can read rows of this embedding [V, D]."""
    return table.dtype in structs.CACHE_DTYPES and table.device.type == "cpu" and table.is_contiguous()


def look_up(library: ctypes.CDLL, table: torch.Tensor, token_ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Rows [N, D] of `table`, which must be one that `can_look_up`, into `out`, float32 and contiguous.

    Args:
        token_ids: [N] int64, contiguous; the caller has checked that they are rows of the table.
    """
    places = (ctypes.c_void_p(one.data_ptr()) for one in (table, token_ids, out))
    library.rheostat_embed(*places, structs.CACHE_DTYPES[table.dtype], *out.shape)
    return out
