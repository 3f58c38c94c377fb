"""Low-rank adapters: of the rank that was asked for, and gone when the training is over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rheostat.adapted import Adapted
from rheostat.methods import Method
from rheostat.train.adapters import targets
from tests.tiny import tiny_adapted, tiny_model
from tests.train.runs import changed, run, weights


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_adapters_are_merged_and_leave_plain_modules(tmp_path, family):
    adapted = tiny_adapted(family)
    adapted.model.requires_grad_(True)
    modules = [(name, type(module)) for name, module in adapted.model.named_modules()]
    before = weights(adapted)
    run(adapted, tmp_path, lora_rank=2)
    assert [(name, type(module)) for name, module in adapted.model.named_modules()] == modules
    assert not any(module.is_naive for module in adapted.modules() if hasattr(module, "is_naive"))
    after = weights(adapted)
    moved = changed(before, after)
    gate = "gate_up_proj" if family == "phi3" else "gate_proj"
    assert {f"model.layers.0.mlp.host.{gate}.weight", "model.layers.1.mlp.host.down_proj.weight"} <= moved
    assert any(".router." in key for key in moved)
    assert any(".downs." in key for key in moved)
    assert not any("self_attn" in key or "embed" in key for key in moved)
    for key in moved:
        if ".host." in key:
            assert int(torch.linalg.matrix_rank(after[key] - before[key], atol=1e-5)) <= 2


def test_adapters_train_the_plain_model_too(tmp_path):
    adapted = Adapted(tiny_model(), Method())
    before = weights(adapted)
    run(adapted, tmp_path, lora_rank=2)
    moved = changed(before, weights(adapted))
    assert moved
    assert all(".mlp." in key for key in moved)
    assert all(type(layer.mlp.up_proj) is nn.Linear for layer in adapted.model.model.layers)


def test_only_weights_of_the_ffn_that_train_are_targets():
    model = tiny_model()
    names = {name for name, _ in model.named_parameters()}
    assert set(targets(model, names)) == {
        f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")
    }
    assert targets(model, {"model.layers.1.mlp.up_proj.weight"}) == ["model.layers.1.mlp.up_proj"]
    assert targets(model, {"model.layers.1.self_attn.q_proj.weight"}) == []
