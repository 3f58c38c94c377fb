"""Three ways to run nested experts are one function; slices share the host's memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rheostat import families
from rheostat.methods.dynamoe.experts import down_of, expert_sizes, run_grouped, run_naive, run_one
from tests.tiny import tiny_model

SIZES = (16, 32, 48, 64)
HOSTS = {family: tiny_model(family) for family in ("llama", "gemma3_text", "phi3")}
MLPS = {family: families.gated_mlp(model, families.layers(model)[0].mlp) for family, model in HOSTS.items()}
torch.manual_seed(0)
OWN = nn.ModuleList(nn.Linear(size, 32) for size in SIZES[:-1])
PLAIN = nn.ModuleList(nn.Linear(size, 32, bias=False) for size in SIZES[:-1])
DOWNS = {"views": nn.ModuleList(), "own": OWN, "without biases": PLAIN}

choices = st.lists(st.integers(-1, 3), min_size=1, max_size=24)
every = pytest.mark.parametrize("family", list(MLPS))
some = pytest.mark.parametrize("kind", list(DOWNS))


def inputs(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(num_tokens))


def one_by_one(x: torch.Tensor, choice: list[int], family: str, downs: nn.ModuleList) -> torch.Tensor:
    """The definition: each token through the first channels of the host's own projections."""
    mlp, rows = MLPS[family], []
    for token, expert in zip(x, choice, strict=True):
        if expert < 0:
            rows.append(torch.zeros(32))
            continue
        hidden = mlp.hidden(token)[: SIZES[expert]]
        if expert < len(downs):
            rows.append(downs[expert](hidden))
        else:
            rows.append(mlp.down.weight[:, : SIZES[expert]] @ hidden)
    return torch.stack(rows)


@every
@some
@given(choice=choices)
@torch.no_grad()
def test_all_ways_are_one_function(family, kind, choice):
    x, downs, mlp = inputs(len(choice)), DOWNS[kind], MLPS[family]
    wanted = one_by_one(x, choice, family, downs)
    for run in (run_grouped, run_naive):
        given_ = run(x, torch.tensor(choice), mlp, downs, SIZES)
        torch.testing.assert_close(given_, wanted, rtol=1e-4, atol=1e-4)


@every
@some
@pytest.mark.parametrize("expert", range(4))
@torch.no_grad()
def test_one_expert_for_all(family, kind, expert):
    x, downs, mlp = inputs(6), DOWNS[kind], MLPS[family]
    wanted = one_by_one(x, [expert] * 6, family, downs)
    torch.testing.assert_close(run_one(x, mlp, downs, expert, SIZES[expert]), wanted, rtol=1e-4, atol=1e-4)
    grouped = run_grouped(x, torch.full((6,), expert), mlp, downs, SIZES)
    torch.testing.assert_close(grouped, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_token_to_run_is_zeros(num_tokens):
    x = inputs(num_tokens)
    out = run_grouped(x, torch.full((num_tokens,), -1), MLPS["llama"], OWN, SIZES)
    assert torch.equal(out, torch.zeros(num_tokens, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype):
    mlp = families.gated_mlp(HOSTS["llama"], tiny_model().to(dtype).model.layers[0].mlp)
    x, choice = inputs(5).to(dtype), torch.tensor([3, 0, -1, 2, 0])
    out = run_grouped(x, choice, mlp, nn.ModuleList(), SIZES)
    assert out.dtype == dtype
    torch.testing.assert_close(out, run_naive(x, choice, mlp, nn.ModuleList(), SIZES), rtol=0.05, atol=0.1)


def test_gradients_of_both_ways_are_the_same():
    choice = torch.tensor([3, 0, -1, 2, 0, 1])
    mlp, grads = MLPS["llama"], []
    parameters = [mlp.host.gate_proj.weight, mlp.host.down_proj.weight, OWN[0].weight, OWN[2].bias]
    for run in (run_grouped, run_naive):
        x = inputs(6).requires_grad_(True)
        loss = run(x, choice, mlp, OWN, SIZES).square().sum()
        grads.append(torch.autograd.grad(loss, [x, *parameters]))
    for mine, twins in zip(*grads, strict=True):
        torch.testing.assert_close(mine, twins, rtol=1e-3, atol=1e-3)
        assert bool(mine.any())


@every
def test_slices_are_views_of_the_host(family):
    mlp = MLPS[family]
    gate, up = mlp.gate_up(0, 16)
    both = getattr(mlp.host, "gate_up_proj", None)
    assert gate.data_ptr() == (mlp.host.gate_proj if both is None else both).weight.data_ptr()
    whole_up = mlp.host.up_proj.weight if both is None else both.weight[64:]
    assert up.data_ptr() == whole_up.data_ptr()
    for expert, size in enumerate(SIZES):
        weight, bias = down_of(mlp, nn.ModuleList(), expert, size)
        assert weight.data_ptr() == mlp.down.weight.data_ptr()
        assert weight.shape == (32, size)
        assert bias is None
    assert down_of(mlp, OWN, 1, 32) == (OWN[1].weight, OWN[1].bias)
    assert down_of(mlp, OWN, 3, 64)[0].data_ptr() == mlp.down.weight.data_ptr()


@given(ffn_size=st.integers(1, 5000), num_experts=st.integers(2, 9), tile=st.integers(1, 300))
def test_sizes_rise_in_tiles_to_the_whole_ffn(ffn_size, num_experts, tile):
    sizes = expert_sizes(ffn_size, num_experts, tile)
    assert all(a < b for a, b in itertools.pairwise(sizes))
    assert sizes[-1] == ffn_size
    assert len(sizes) <= num_experts
    assert all(size % tile == 0 for size in sizes[:-1])
    assert sizes[0] >= min(ffn_size, ffn_size / num_experts)
    if tile == 1 and ffn_size >= num_experts:
        assert len(sizes) == num_experts
        assert all(abs(size - ffn_size * (e + 1) / num_experts) < 1 for e, size in enumerate(sizes))


def test_sizes_of_smollm2():
    assert expert_sizes(1536, 4, 64) == (384, 768, 1152, 1536)
    assert expert_sizes(1536, 5, 64) == (320, 640, 960, 1280, 1536)
    assert expert_sizes(64, 4, 64) == (64,)
