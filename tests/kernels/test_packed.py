from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.kernels import pack, packed
from rheostat.kernels.packed import check_edges, quantise_groups
from tests.kernels.cases import FORMATS, distance, random_matrix

LOSS = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 1e-2, "int4": 0.2}
"""What packing may do to a random matrix, relative to its norm: half a unit in the last place for 16 bits."""


@settings(deadline=None, max_examples=60)
@given(
    case=st.sampled_from(FORMATS), num_rows=st.integers(0, 70), num_cols=st.integers(1, 200), seed=st.integers(0, 99)
)
def test_unpacking_gives_the_weights_back(case, num_rows, num_cols, seed):
    weight = torch.randn(num_rows, num_cols, generator=torch.Generator().manual_seed(seed))
    made = pack(weight, case[0], case[1] or 32)
    assert made.shape == made.unpack().shape == weight.shape
    assert distance(made.unpack(), weight) <= LOSS[case[0]]


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_rows_are_those_of_the_whole(format, group):
    made = random_matrix(37, 100, format, group, torch.Generator().manual_seed(0))
    index = torch.tensor([36, 0, 17, 17])
    assert torch.equal(made.rows(index), made.unpack()[index])
    assert made.rows(index[:0]).shape == (0, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 77), (50, 130)])
def test_native_packing_gives_the_bits_of_the_other(shape, dtype, monkeypatch):
    """Ties, zeros of both signs and subnormal numbers too, and rows that lie apart."""
    whole = torch.randn(shape[0], shape[1] + 3, generator=torch.Generator().manual_seed(0))
    whole.view(torch.int32).bitwise_and_(-0x8000)  # halfway, or representable
    odd = torch.tensor([1e-40, -1e-42, -0.0, 0.0, 3e38, 1.00390625])
    whole.flatten()[: len(odd)] = odd[: whole.numel()]
    for weight in (whole[:, :-3].to(dtype), whole.to(dtype)[:, :-3]):
        found = pack(weight, "bf16")
        monkeypatch.setattr(packed, "library", lambda: None)
        assert torch.equal(found.data, pack(weight, "bf16").data)
        monkeypatch.undo()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.zeros(20, 20)
    weight[17, 19] = value
    with pytest.raises(SettingError, match="finite"):
        pack(weight, "bf16")


def test_bytes():
    weight = torch.randn(64, 128)
    sizes = {(f, g): pack(weight, f, g or 32).nbytes / weight.numel() for f, g in FORMATS}
    assert sizes["fp32", 0] == 4
    assert sizes["bf16", 0] == sizes["fp16", 0] == 2
    assert sizes["int8", 0] == 1 + 4 / 128
    assert (sizes["int4", 32], sizes["int4", 64]) == (5 / 8, 4.5 / 8)
    half = pack(weight, "int4", 32)
    assert half.bytes_of(num_rows=32) == half.bytes_of(num_cols=64) == half.nbytes // 2


def test_weights_on_a_grid_of_four_bits_are_kept_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (50, 32), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 15
    scale, least = torch.rand(50, 1, generator=generator).half().float(), torch.randn(50, 1, generator=generator).half()
    weight = scale * codes + least.float()
    assert torch.equal(pack(weight, "int4", 32).unpack(), weight)


def test_the_search_for_a_range_beats_the_plain_one():
    groups = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    codes, scale, least = quantise_groups(groups)
    found = codes * scale[:, None] + least[:, None]
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    assert (found - groups).square().sum() < 0.97 * (plain - groups).square().sum()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_weights(value):
    for format, group in FORMATS:
        assert torch.allclose(pack(torch.full((20, 128), value), format, group or 32).unpack(), torch.tensor(value))


@pytest.mark.parametrize(("format", "group"), FORMATS[1:])
def test_what_a_format_cannot_hold_is_refused(format, group):
    for value in (float("nan"), float("inf"), 1e6 if format in ("fp16", "int4") else float("-inf")):
        weight = torch.zeros(3, 40)
        weight[1, 5] = value
        with pytest.raises(SettingError, match=f"format='{format}'"):
            pack(weight, format, group or 32)


def test_bad_settings_are_named():
    with pytest.raises(SettingError, match="format='q4'"):
        pack(torch.ones(2, 2), "q4")
    with pytest.raises(SettingError, match="group=48"):
        pack(torch.ones(2, 2), "int4", 48)
    for weight in (torch.ones(2), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(SettingError, match="weight="):
            pack(weight, "fp32")


def test_a_group_never_straddles_an_experts_edge():
    down = pack(torch.randn(16, 256), "int4", 64)
    check_edges((64, 128, 256), down)
    with pytest.raises(SettingError, match="tile=96"):
        check_edges((96, 256), down)
    check_edges((96, 256), pack(torch.randn(16, 256), "int4", 32))
    check_edges((7, 256), pack(torch.randn(16, 256), "int8"))
