"""The sizes read from a configuration are those of the weights."""

from __future__ import annotations

import json

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig, Phi3Config

from rheostat import families
from rheostat.errors import SettingError
from rheostat.geometry import Geometry
from tests.tiny import FAMILIES, SIZES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_own(family):
    model = tiny_model(family)
    geometry = Geometry.from_config(model.config)
    for layer in families.layers(model):
        attention = [p.numel() for p in layer.self_attn.parameters() if p.dim() == 2]
        assert sum(attention) == geometry.attention_weights
        assert sum(p.numel() for p in layer.mlp.parameters()) == geometry.ffn_weights
        assert families.gated_mlp(model, layer.mlp).ffn_size == geometry.ffn_size
    assert families.head(model).weight.numel() == geometry.head_weights
    assert len(families.layers(model)) == geometry.num_layers
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    embedding = 0 if geometry.is_tied else geometry.head_weights
    assert geometry.token_flops == 2 * (matrices - embedding)
    assert geometry.is_tied == (families.head(model).weight is model.get_input_embeddings().weight)


def test_windows_follow_the_kinds_of_layers():
    geometry = Geometry.from_config(tiny_model("gemma2").config)
    assert geometry.windows == (16, 0)
    assert Geometry.from_config(tiny_model("llama").config).windows == ()
    assert Geometry.from_config(tiny_model("qwen2").config).windows == ()


@pytest.mark.parametrize("kind", [MistralConfig, Phi3Config])
def test_a_window_without_kinds_of_layers_holds_for_all(kind):
    assert Geometry.from_config(kind(**SIZES | {"sliding_window": 7})).windows == (7, 7)
    assert Geometry.from_config(kind(**SIZES | {"sliding_window": None})).windows == ()


def test_head_width_and_kv_heads_have_defaults():
    sizes = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    geometry = Geometry.from_config(LlamaConfig(**sizes))
    assert (geometry.head_dim, geometry.num_kv_heads) == (8, 4)
    assert geometry.kv_values == 2 * 4 * 8


def test_the_first_layers_keep_their_windows():
    geometry = Geometry.from_config(tiny_model("gemma3_text").config)
    first = geometry.first_layers(1)
    assert (first.num_layers, first.windows) == (1, geometry.windows[:1])
    assert first.ffn_weights == geometry.ffn_weights


def test_a_model_without_the_sizes_is_refused():
    with pytest.raises(
        SettingError, match=r"model='gpt2': must be a decoder whose configuration has intermediate_size"
    ):
        Geometry.from_config(GPT2Config())


def test_to_dict_is_json():
    geometry = Geometry.from_config(tiny_model("gemma3_text").config)
    table = json.loads(json.dumps(geometry.to_dict()))
    assert Geometry(**table | {"windows": tuple(table["windows"])}) == geometry
