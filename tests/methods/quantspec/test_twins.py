"""Linear layers with 4-bit twins."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from rheostat.methods.quantspec.twins import TwinLinear, drafting, four_bit


def twin(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, TwinLinear]:
    torch.manual_seed(0)
    host = nn.Linear(32, 8, bias=True).to(dtype)
    return host, TwinLinear(host, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_a_draft_reads_four_bits(dtype):
    host, both = twin(dtype)
    x = torch.randn(3, 32).to(dtype)
    full = both(x)
    assert torch.equal(full, host(x))
    with drafting():
        draft = both(x)
        assert torch.equal(draft, nn.functional.linear(x, four_bit(host.weight, 8), host.bias))
        assert both.weight.dtype == dtype
    assert not torch.equal(draft, full)
    assert torch.equal(both(x), full)


def test_sixteen_values_a_group():
    weight = torch.randn(4, 64)
    groups = four_bit(weight, 32).view(4, 2, 32)
    assert all(len(group.unique()) <= 16 for row in groups for group in row)
    assert (four_bit(weight, 32) - weight).abs().max() < 0.25


def test_parameters_are_shared_and_keep_their_names():
    host, both = twin()
    assert both.weight is host.weight
    assert list(both.state_dict()) == list(host.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in both.named_parameters()] == ["weight", "bias"]


def test_a_draft_follows_its_weights():
    host, both = twin()
    with drafting():
        before = both.weight.clone()
    with torch.no_grad():
        host.weight.mul_(2)
    with drafting():
        torch.testing.assert_close(both.weight, 2 * before, rtol=2e-3, atol=2e-3)


def test_other_threads_do_not_draft():
    _, both = twin()
    seen = []
    with drafting():
        thread = threading.Thread(target=lambda: seen.append(both.weight is both.host.weight))
        thread.start()
        thread.join()
    assert seen == [True]


def test_bytes():
    _, both = twin(torch.bfloat16)
    assert both.saved_bytes == 32 * 8 * 2 - (32 * 8 // 2 + 4 * 32 * 8 // 8)
