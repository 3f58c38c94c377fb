from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.kernels import plain
from rheostat.kernels.triton import DeviceMatrix, few_rows
from rheostat.kernels.triton.products import CANDIDATES
from tests.kernels.triton.cases import DEVICE, FORMATS, TOLERANCE, distance, random_matrix, random_rows, seeded

DTYPES = sorted(TOLERANCE, key=str)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, 2, 7, 16, 18]),
    st.integers(0, 70),
    st.integers(1, 300),
    st.booleans(),
    st.data(),
    st.integers(0, 99),
)
def test_few_rows(case, dtype, num_rows, num_outputs, num_inputs, has_bias, data, seed):
    g = seeded(seed)
    w = random_matrix(num_outputs, num_inputs, *case, g)
    start = data.draw(st.integers(0, num_outputs))
    stop = data.draw(st.integers(start, num_outputs))
    bias = random_rows(stop - start, g=g) if has_bias else None
    x = random_rows(num_rows, num_inputs, g=g, dtype=dtype)
    y, wanted = few_rows(x, w, start, stop, bias), plain.few_rows(x.float(), w, start, stop, bias)
    assert (y.shape, y.dtype) == (wanted.shape, dtype)
    # Against the size of x: a short sum may cancel to nearly zero, the rounding of its terms does not.
    error = float((y.float() - wanted).norm())
    assert error <= TOLERANCE[dtype] * max(float(x.float().norm()) * (num_outputs / num_inputs) ** 0.5, 1e-6)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_each_weight_is_where_it_belongs(format, group):
    """One-hot rows: the product is a column, to the last bit of float32."""
    w = random_matrix(35, 70, format, group, seeded(0))
    eye, wanted = torch.eye(70, device=DEVICE), w.unpack().T
    assert torch.allclose(few_rows(eye, w), wanted, rtol=1e-6, atol=1e-7)
    for i in (0, 33, 64, 69):
        assert torch.allclose(few_rows(eye[i : i + 1], w), wanted[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tiles", [one for ways in CANDIDATES.values() for one in ways])
def test_every_way_to_cut(tiles):
    w = random_matrix(37, 150, "int4", 64, seeded(0))
    for rows in (1, 5):
        x = random_rows(rows, 150, g=seeded(1))
        if rows > 1 and min(tiles.outputs, tiles.inputs) < 16:
            continue  # a product of the matrix units takes at least 16 by 16
        assert distance(few_rows(x, w, tiles=tiles), plain.few_rows(x, w)) < 1e-6


def test_strided_input_and_given_output():
    w = random_matrix(20, 64, "fp32", 0, seeded(0))
    wide = random_rows(3, 128, g=seeded(1))
    wanted = plain.few_rows(wide[:, ::2], w)
    for x in (wide[:, ::2], wide.T[::2].T, wide[:, ::2].clone().T.contiguous().T):
        assert torch.allclose(few_rows(x, w), wanted, atol=1e-5)
    room = torch.zeros(3, 40, dtype=torch.float16, device=DEVICE)
    out = room[:, 5:25]
    assert few_rows(wide[:, ::2], w, out=out) is out
    assert torch.allclose(out.float(), wanted, atol=1e-2)
    assert not room[:, :5].any()
    assert not room[:, 25:].any()


def test_a_view_of_a_wider_weight():
    weight = random_rows(30, 96, g=seeded(0))
    x = random_rows(2, 40, g=seeded(1))
    assert torch.allclose(few_rows(x, DeviceMatrix.view(weight[:, :40])), x @ weight[:, :40].T, atol=1e-5)


def test_what_does_not_fit_is_refused():
    w = random_matrix(20, 64, "int8", 0, seeded(0))
    x = random_rows(2, 64, g=seeded(1))
    for bad in (x.double(), x[0], x[:, :63], x.to("meta")):
        with pytest.raises(SettingError, match="x="):
            few_rows(bad, w)
    for start, stop in ((-1, 5), (5, 4), (0, 21)):
        with pytest.raises(SettingError, match="start, stop="):
            few_rows(x, w, start, stop)
    with pytest.raises(SettingError, match="bias="):
        few_rows(x, w, 0, 10, torch.zeros(20, device=DEVICE))
    with pytest.raises(SettingError, match="out="):
        few_rows(x, w, out=torch.empty(20, 2, device=DEVICE).T)
