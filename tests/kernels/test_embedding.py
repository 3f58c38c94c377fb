"""Rows of an embedding in native code are the rows of the tensor."""

from __future__ import annotations

import pytest
import torch

from rheostat import kernels
from rheostat.kernels.embedding import can_look_up, look_up

native = pytest.mark.skipif(kernels.library() is None, reason="no native code here")


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (5, 37), (64, 64)])
def test_rows_come_as_they_are(dtype, num_rows, width):
    table = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.randint(num_rows, (9,), generator=torch.Generator().manual_seed(1))
    out = torch.full((9, width), float("nan"))
    assert look_up(kernels.library(), table, ids, out) is out
    assert torch.equal(out, table[ids].float())


@native
def test_no_ids_are_no_rows():
    out = torch.empty(0, 8)
    assert look_up(kernels.library(), torch.randn(3, 8), torch.empty(0, dtype=torch.int64), out).shape == (0, 8)


def test_what_cannot_be_read_natively_is_known():
    table = torch.randn(6, 8)
    assert can_look_up(table)
    assert not can_look_up(table[:, ::2])
    assert not can_look_up(table.double())
