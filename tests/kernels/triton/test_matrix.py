from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.kernels import pack as pack_panels
from rheostat.kernels.triton import DeviceMatrix
from tests.kernels.triton.cases import FORMATS, random_matrix, seeded


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FORMATS), st.integers(0, 70), st.integers(1, 200), st.integers(0, 99))
def test_the_numbers_are_those_of_the_packed_matrix(case, num_rows, num_cols, seed):
    packed = pack_panels(torch.randn(num_rows, num_cols, generator=seeded(seed)), case[0], case[1] or 32)
    matrix = DeviceMatrix.of(packed)
    assert matrix.shape == packed.shape
    assert torch.equal(matrix.unpack(), packed.unpack())
    assert torch.equal(matrix.clone().unpack(), packed.unpack())


def test_bytes():
    sizes = {(f, g): random_matrix(64, 128, f, g, seeded(0)).nbytes / 64 / 128 for f, g in FORMATS}
    assert sizes["fp32", 0] == 4
    assert sizes["bf16", 0] == sizes["fp16", 0] == 2
    assert sizes["int8", 0] == 1 + 4 / 128
    assert (sizes["int4", 32], sizes["int4", 64]) == (5 / 8, 4.5 / 8)
    for format, group in FORMATS:
        matrix = random_matrix(64, 128, format, group, seeded(0))
        assert matrix.bytes_of() == matrix.nbytes
        assert matrix.bytes_of(num_rows=32) == matrix.nbytes / 2
        assert matrix.bytes_of(num_cols=64) == (matrix.nbytes + (256 if format == "int8" else 0)) / 2


def test_a_view_copies_nothing():
    weight = torch.randn(6, 40)[:, :24]
    assert DeviceMatrix.view(weight).values.data_ptr() == weight.data_ptr()
    assert torch.equal(DeviceMatrix.view(weight).unpack(), weight)


@pytest.mark.parametrize("weight", [torch.randn(6, 4).T, torch.randn(4), torch.ones(2, 2, dtype=torch.int8)])
def test_what_cannot_be_viewed_is_refused(weight):
    with pytest.raises(SettingError, match="weight="):
        DeviceMatrix.view(weight)
