"""A layer that was kept is the layer that was solved."""

from __future__ import annotations

from pathlib import Path

import torch

from rheostat.methods.dynamoe import keeping
from rheostat.methods.dynamoe.method import DynaMoE, nested_ffns
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

METHOD = DynaMoE(tile=4, router_width=8, router_steps=30)


def test_a_layer_comes_back_whole(tmp_path: Path):
    solved = nested_ffns(tiny_adapted().model)[0]
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    keeping.keep(tmp_path / "deep" / "layer.safetensors", solved, {"router_loss": 0.5}, generator)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["layer.safetensors"]

    model = tiny_model()
    METHOD.attach(model)
    fresh, again = nested_ffns(model)[0], torch.Generator()
    facts = keeping.restore(tmp_path / "deep" / "layer.safetensors", fresh, again, has_bias=True)
    assert facts == {"router_loss": 0.5}
    assert torch.equal(torch.rand(3, generator=again), torch.rand(3, generator=generator))
    x = torch.randn(9, fresh.mlp.hidden_size)
    choice = torch.arange(9) % len(fresh.sizes)
    assert torch.equal(fresh.run(x, choice), solved.run(x, choice))
    assert torch.equal(fresh.router(x), solved.router(x))
    assert torch.equal(fresh.mean_damage, solved.mean_damage)


def test_nothing_kept_is_nothing(tmp_path: Path):
    model = tiny_model()
    METHOD.attach(model)
    fresh = nested_ffns(model)[0]
    before = model(input_ids=tiny_windows(1)).logits
    assert keeping.restore(tmp_path / "none", fresh, torch.Generator(), has_bias=True) is None
    (tmp_path / "half").write_bytes(b"half")
    assert keeping.restore(tmp_path / "half", fresh, torch.Generator(), has_bias=True) is None
    assert torch.equal(model(input_ids=tiny_windows(1)).logits, before)
