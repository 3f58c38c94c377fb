"""From a model to its weights: nothing is copied, and what is not known to be computed as we do it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rheostat.runtime.building import Unsupported, build, stamp
from rheostat.runtime.packing import matrices
from tests.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "smollm3"])
def test_nothing_is_copied(family):
    model = tiny_model(family)
    storages = {one.untyped_storage().data_ptr() for one in model.parameters()}
    weights = build(model)
    assert all(one.untyped_storage().data_ptr() in storages for one in matrices(weights))
    assert not any(one.requires_grad for one in matrices(weights))
    assert sum(one.numel() for one in matrices(weights)) == sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_tied_and_untied_heads():
    tied, untied = build(tiny_model("llama")), build(tiny_model("qwen3"))
    assert tied.head is tied.embedding
    assert untied.head is not untied.embedding


def patched_forward(model: Any) -> None:
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: None


def hook(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *args: None)


def adapter(model: Any) -> None:
    class Low(nn.Linear):
        """As of a library that adds something to a projection."""

    model.model.layers[0].self_attn.q_proj = Low(32, 32, bias=False)


def own_norm(model: Any) -> None:
    model.model.norm = nn.RMSNorm(32)


def own_embedding(model: Any) -> None:
    class Scaled(nn.Embedding):
        """As of a family that multiplies what it looks up."""

    model.model.embed_tokens = Scaled(97, 32)


def head_bias(model: Any) -> None:
    model.lm_head = nn.Linear(32, 97)


def own_attention(model: Any) -> None:
    model.config._attn_implementation = "somebodys_own"


def own_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()


def other_rope(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


CHANGES: dict[Callable[[Any], Any], str] = {
    nn.Module.train: "training mode",
    patched_forward: "LlamaAttention",
    hook: "a hook on Linear",
    adapter: "a projection of the kind Low",
    own_norm: "a module of the kind RMSNorm",
    own_embedding: "an embedding of the kind Scaled",
    head_bias: "biases in the FFN or the head",
    own_attention: "the attention somebodys_own",
    own_activation: "the activation Tanh",
    other_rope: "rotary positions of the kind dynamic",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_what_may_compute_something_else_is_refused_with_the_reason(change):
    model = tiny_model()
    build(model)
    change(model)
    with pytest.raises(Unsupported, match=CHANGES[change]):
        build(model)


def test_a_hook_that_the_caller_answers_for_is_let_through():
    model = tiny_model()
    handle = model.model.layers[0].register_forward_pre_hook(lambda *args: None)
    with pytest.raises(Unsupported, match="a hook on LlamaDecoderLayer"):
        build(model)
    build(model, frozenset({handle.id}))


# -- whether a model is still what it was


def stamped(model: Any) -> tuple[Any, ...]:
    return stamp(model, build(model))


def test_the_stamp_is_the_same_for_the_same_model():
    model = tiny_model()
    first = stamped(model)
    with torch.inference_mode():
        model(torch.ones(1, 4, dtype=torch.long))
    assert stamped(model) == first


def written(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1


def replaced(model: Any) -> None:
    projection = model.model.layers[1].self_attn.k_proj
    projection.weight = nn.Parameter(projection.weight.detach().clone())


def rescaled(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


def windowed(model: Any) -> None:
    model.model.layers[0].self_attn.sliding_window = 5


@pytest.mark.parametrize("change", [written, replaced, rescaled, windowed])
def test_a_change_of_what_is_computed_shows_in_the_stamp(change):
    model = tiny_model()
    first = stamped(model)
    change(model)
    assert stamped(model) != first
