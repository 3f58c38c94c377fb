"""What each family calls its parts, shown on a tiny model of every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rheostat import families
from rheostat.errors import SettingError
from rheostat.methods import DynaMoE, Method
from tests.tiny import FAMILIES, SIZES, tiny_adapted, tiny_model, tiny_windows

every = pytest.mark.parametrize("family", FAMILIES)


def test_every_listed_family_is_tested_or_a_twin_of_one_that_is():
    assert set(families.FAMILIES) - set(FAMILIES) == {"gemma"}
    assert families.FAMILIES["gemma"] == families.FAMILIES["llama"]


@every
def test_gated_mlp_sees_the_hosts_function(family):
    model = tiny_model(family)
    layer = families.layers(model)[1]
    mlp = families.gated_mlp(model, layer.mlp)
    assert (mlp.ffn_size, mlp.hidden_size) == (64, 32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp.down(mlp.hidden(x)), layer.mlp(x))
    gate, up = mlp.gate_up(8, 24)
    part = mlp.act(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(part, mlp.hidden(x)[:, 8:24], rtol=1e-4, atol=1e-5)
    storages = {p.untyped_storage().data_ptr() for p in layer.mlp.parameters()}
    assert {w.untyped_storage().data_ptr() for w in (gate, up)} <= storages  # views, not copies
    blocks = mlp.gate_up_blocks((8, 24, 64))
    for (start, stop), block in zip(((0, 8), (8, 24), (24, 64)), blocks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(block, mlp.gate_up(start, stop), strict=True))


@every
def test_reorder_keeps_the_function_and_can_be_undone(family):
    model = tiny_model(family)
    mlp = families.gated_mlp(model, families.layers(model)[0].mlp)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    hidden, y = mlp.hidden(x), mlp.host(x)
    before = [p.clone() for p in mlp.host.parameters()]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    mlp.reorder(order)
    assert not torch.equal(mlp.down.weight, before[-1])
    torch.testing.assert_close(mlp.hidden(x), hidden[:, order])
    torch.testing.assert_close(mlp.host(x), y, rtol=1e-4, atol=1e-4)
    mlp.reorder(order.argsort())
    assert all(torch.equal(a, b) for a, b in zip(mlp.host.parameters(), before, strict=True))


@every
def test_norms_sit_around_the_mlp(family):
    """residual + contribution(mlp(pre_norm(residual))) is what the layer returns."""
    model = tiny_model(family)
    layer = families.layers(model)[0]
    seen = {}
    families.pre_norm(model, layer).register_forward_pre_hook(lambda _, args: seen.update(residual=args[0]))
    layer.mlp.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    with torch.no_grad():
        states = model(input_ids=tiny_windows(2), output_hidden_states=True).hidden_states
        torch.testing.assert_close(families.pre_norm(model, layer)(seen["residual"]), seen["x"])
        added = families.contribution(model, layer)(seen["y"])
        torch.testing.assert_close(seen["residual"] + added, states[1])
        assert torch.equal(added, seen["y"]) == (families.family_of(model).post_norm is None)


@every
def test_plain_state_dict_has_the_original_names(family):
    model = tiny_model(family)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    assert families.plain_state_dict(model).keys() <= original.keys()
    adapted = tiny_adapted(family)
    plain = families.plain_state_dict(adapted.model)
    assert list(plain) == list(families.plain_state_dict(model))
    missing = original.keys() - plain.keys()
    assert missing == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    # The same function: channels in another order, nothing else.
    fresh = tiny_model(family, seed=3)
    fresh.load_state_dict(plain, strict=False)
    with torch.no_grad():
        mine, theirs = fresh(input_ids=tiny_windows(2)).logits, model(input_ids=tiny_windows(2)).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("method", [Method(), DynaMoE(tile=4)])
def test_a_family_without_gated_mlps_is_refused(method):
    with pytest.raises(SettingError, match=r"model='gpt2': must be of a family with a gated MLP: gemma, .*smollm3"):
        method.check(tiny_gpt2())


def test_what_is_no_model_is_refused():
    with pytest.raises(SettingError, match="model='Linear'"):
        families.family_of(nn.Linear(2, 2))


def test_biases_in_the_mlp_are_refused():
    model = type(tiny_model())(tiny_model().config.__class__(**SIZES | {"mlp_bias": True}))
    with pytest.raises(SettingError, match="model='LlamaMLP with biases': must be a model whose MLP has no biases"):
        DynaMoE(tile=4).check(model)
    assert not any(hasattr(layer.mlp, "router") for layer in families.layers(model))


def test_an_mlp_without_the_projections_is_refused():
    model = tiny_model()
    with pytest.raises(
        SettingError, match="model='Identity': must be a model whose MLP has gate_proj, up_proj, down_proj"
    ):
        families.gated_mlp(model, nn.Identity())
