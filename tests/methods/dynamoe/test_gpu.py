from __future__ import annotations

import importlib.util

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.families import gated_mlp
from rheostat.methods.dynamoe import gpu
from rheostat.methods.dynamoe.experts import run_grouped
from rheostat.methods.dynamoe.ffn import NestedFFN
from rheostat.methods.dynamoe.routing import Router
from tests.tiny import tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (16, 40, 64)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def nested(family: str = "llama", downs: bool = False) -> NestedFFN:
    """One layer's FFN with three experts, its weights as large as a trained model's."""
    torch.manual_seed(0)
    model = tiny_model(family).to(DEVICE)
    mlp = gated_mlp(model, model.model.layers[0].mlp)
    ffn = NestedFFN(mlp, 0, SIZES, Router(mlp.hidden_size, 8, 2), "damage", "x").to(DEVICE)
    if downs:
        ffn.add_downs(has_bias=True)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ffn


@needs_triton
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("downs", [False, True])
@torch.no_grad()
def test_the_kernels_are_the_experts(family, downs):
    ffn = nested(family, downs)
    ffn.execution = "triton"
    for num_tokens in (1, 3, 20):
        x = torch.randn(num_tokens, ffn.mlp.hidden_size, device=DEVICE)
        choice = torch.randint(-1, 3, (num_tokens,), device=DEVICE)
        wanted = run_grouped(x, choice, ffn.mlp, ffn.downs, ffn.sizes)
        assert torch.allclose(ffn.run(x, choice), wanted, rtol=1e-4, atol=1e-5)


@needs_triton
@torch.no_grad()
def test_weights_that_change_or_move_are_seen():
    ffn = nested(downs=True)
    ffn.execution = "triton"
    x, choice = torch.randn(4, ffn.mlp.hidden_size, device=DEVICE), torch.tensor([0, 1, 2, -1], device=DEVICE)
    for change in (
        lambda: None,
        lambda: ffn.mlp.down.weight.mul_(-2),
        lambda: setattr(ffn.downs[0], "weight", torch.nn.Parameter(torch.randn_like(ffn.downs[0].weight))),
        lambda: setattr(ffn.mlp.host.gate_proj, "weight", torch.nn.Parameter(ffn.mlp.host.gate_proj.weight * 3)),
    ):
        change()
        wanted = run_grouped(x, choice, ffn.mlp, ffn.downs, ffn.sizes)
        assert torch.allclose(ffn.run(x, choice), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the default on a CPU")
def test_torch_is_the_default_on_a_cpu(monkeypatch):
    ffn = nested()
    monkeypatch.setattr(gpu, "_obstacle", lambda *_: pytest.fail("Triton was considered"))
    x = torch.randn(2, ffn.mlp.hidden_size)
    for ffn.execution in ("auto", "torch"):
        ffn.run(x, torch.tensor([0, 1]))


@needs_triton
def test_gradients_are_torchs():
    ffn = nested(downs=True)
    x = torch.randn(2, ffn.mlp.hidden_size, device=DEVICE)
    ffn.run(x, torch.tensor([0, 2], device=DEVICE)).sum().backward()
    assert ffn.downs[0].weight.grad is not None
    ffn.execution = "triton"
    with pytest.raises(SettingError, match="execution='triton': must be torch here: gradients"):
        ffn.run(x, torch.tensor([0, 2], device=DEVICE))


@needs_triton
@torch.no_grad()
def test_what_the_kernels_cannot_do_is_said():
    ffn = nested()
    ffn.execution = "triton"
    x, choice = torch.randn(2, ffn.mlp.hidden_size, device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    with pytest.raises(SettingError, match="differ in dtype"):
        ffn.run(x.bfloat16(), choice)
    with pytest.raises(SettingError, match="autocast"), torch.autocast(DEVICE.type, torch.bfloat16):
        ffn.run(x, choice)
    ffn.mlp.host.act_fn = torch.nn.Mish()
    with pytest.raises(SettingError, match="Mish"):
        ffn.run(x, choice)
    ffn.execution = "cuda"
    with pytest.raises(SettingError, match="execution='cuda': must be one of auto, torch, triton"):
        ffn.run(x, choice)
