"""A skeleton is to our own runtime what the model of `transformers` is; what it might not be is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rheostat.methods import DynaMoE
from rheostat.runtime.building import build
from rheostat.skeleton import BIASES, Config, Skeleton, Unknown
from tests.tiny import tiny_model


def parts(family: str, **changes: Any) -> tuple[Any, Config, dict[str, torch.Tensor]]:
    """The model, what its configuration file says, and its tensors as a checkpoint names them."""
    model = tiny_model(family)
    settings = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return model, Config(**settings | changes), tensors


def flat(weights: Any) -> list[Any]:
    """All fields, in order; tensors as lists of numbers."""
    if dataclasses.is_dataclass(weights):
        return [one for field in dataclasses.fields(weights) for one in flat(getattr(weights, field.name))]
    if isinstance(weights, tuple | list):
        return [one for value in weights for one in flat(value)]
    return [weights.tolist() if isinstance(weights, torch.Tensor) else weights]


@pytest.mark.parametrize("family", sorted(BIASES))
def test_the_runtime_sees_the_same_model(family):
    model, config, tensors = parts(family)
    skeleton = Skeleton(config, tensors)
    assert flat(build(skeleton)) == flat(build(model))
    assert (skeleton.dtype, skeleton.device, skeleton.training) == (model.dtype, model.device, False)
    assert (
        skeleton.model.layers[0].mlp.up_proj.weight.data_ptr()
        == tensors["model.layers.0.mlp.up_proj.weight"].data_ptr()
    )


def test_a_method_attaches_as_to_the_model():
    model, config, tensors = parts("llama")
    skeleton = Skeleton(config, tensors)
    for one in (model, skeleton):
        torch.manual_seed(0)
        DynaMoE(tile=4).attach(one)
    assert flat(build(skeleton)) == flat(build(model))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma2"}, "the family gemma2"),
        ({"hidden_act": "gelu"}, "another activation"),
        ({"mlp_bias": True}, "biases"),
        ({"quantization_config": {}}, "quantised"),
        ({"rms_norm_eps": None}, "without rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary positions"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotary positions",
        ),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "windows"),
        ({"num_hidden_layers": 3}, "the tensor model.layers.2"),
        ({"intermediate_size": 65}, "the shape of"),
        ({"tie_word_embeddings": False}, "the tensor lm_head.weight"),
    ],
)
def test_anything_else_is_unknown(changes, reason):
    _, config, tensors = parts("llama", **changes)
    with pytest.raises(Unknown, match=reason):
        Skeleton(config, tensors)


def test_windows_of_mistral_are_unknown():
    _, config, tensors = parts("mistral", sliding_window=16)
    with pytest.raises(Unknown, match="windows"):
        Skeleton(config, tensors)


def test_it_cannot_be_called():
    _, config, tensors = parts("llama")
    with pytest.raises(NotImplementedError):
        Skeleton(config, tensors)(torch.zeros(1, 1, dtype=torch.long))
