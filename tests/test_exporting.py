"""What is exported is a plain checkpoint that does at every token what the slice does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.exporting import export
from rheostat.geometry import Geometry
from rheostat.methods import Chain, DynaMoE, Method
from rheostat.methods.dynamoe.experts import run_one
from rheostat.methods.dynamoe.method import nested_ffns
from rheostat.report import card
from tests.tiny import FAMILIES, tiny_adapted, tiny_model, tiny_windows

IDS = tiny_windows(2, 16)
BIASED = ("llama", "smollm3")
"""Families whose MLP has a switch for biases."""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@contextmanager
def one_slice(adapted: Adapted, expert: int) -> Iterator[None]:
    """Every token of every layer through one slice, the first token too."""
    ffns = nested_ffns(adapted.model)
    for ffn in ffns:
        ffn.forward = lambda x, ffn=ffn: run_one(x, ffn.mlp, ffn.downs, expert, ffn.sizes[expert])
    yield
    for ffn in ffns:
        del ffn.forward


@pytest.mark.parametrize(
    ("family", "refit_bias"), [(f, False) for f in FAMILIES] + [(f, True) for f in BIASED], ids=str
)
@pytest.mark.parametrize("expert", [0, 2])
def test_the_plain_model_equals_the_slice(family, refit_bias, expert, tiny_tokenizer, tmp_path):
    adapted = tiny_adapted(family, refit_bias=refit_bias, router_steps=1)
    geometry = adapted.geometry
    size = nested_ffns(adapted.model)[0].sizes[expert]
    compute = 1 - 2 * geometry.num_layers * geometry.channel_weights * (64 - size) / geometry.token_flops
    folder = export(adapted, tiny_tokenizer, tmp_path / "plain", compute + 1e-6)
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with one_slice(adapted, expert):
        wanted = logits(adapted)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(adapted), wanted, atol=1e-3)
    smaller = Geometry.from_config(plain.config)
    assert smaller.ffn_size == size
    assert smaller.token_flops / geometry.token_flops == pytest.approx(compute)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_full_compute_is_the_dense_model(family, tiny_tokenizer, tmp_path):
    adapted = tiny_adapted(family)  # biases and all: they are not needed here
    plain = AutoModelForCausalLM.from_pretrained(export(adapted, tiny_tokenizer, tmp_path / "plain"))
    torch.testing.assert_close(logits(plain), logits(tiny_model(family)), rtol=1e-4, atol=1e-4)


def test_the_widest_slice_that_fits_is_taken(tiny_tokenizer, tmp_path):
    adapted = tiny_adapted(router_steps=1)
    folder = export(adapted, tiny_tokenizer, tmp_path / "plain", 0.9)
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 48
    assert config["mlp_bias"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert adapted.config.intermediate_size == 64
    assert not adapted.config.mlp_bias
    assert "rheostat.json" not in os.listdir(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "48 of 64 FFN channels" in text
    assert "0.9 was the most it might cost" in text
    assert card.is_ours(text)


def test_below_the_smallest_slice_what_is_possible_is_listed(tiny_tokenizer, tmp_path):
    with pytest.raises(
        SettingError,
        match=r"compute=0.3: must be at least 0\.\d+: .*\(16 channels\), .*\(48 channels\), 1.000 \(64 channels\)",
    ):
        export(tiny_adapted(router_steps=1), tiny_tokenizer, tmp_path / "plain", 0.3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("compute", [float("nan"), 1.5, -1.0])
def test_a_compute_that_is_none_is_refused(compute, tiny_tokenizer, tmp_path):
    with pytest.raises(SettingError, match=f"compute={compute}"):
        export(tiny_adapted(router_steps=1), tiny_tokenizer, tmp_path / "plain", compute)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in BIASED])
def test_biases_without_a_place_are_refused_with_the_way_out(family, tiny_tokenizer, tmp_path):
    with pytest.raises(SettingError, match=rf"a plain {family} MLP has no place for them; .*refit_bias=false"):
        export(tiny_adapted(family, router_steps=1), tiny_tokenizer, tmp_path / "plain", 0.8)
    assert os.listdir(tmp_path) == []


def test_methods_without_a_cheaper_setting_say_so(tiny_tokenizer, tmp_path):
    adapted = Adapted(tiny_model(), Method())
    with pytest.raises(SettingError, match=r"compute=0.5: must be 1.0: dense has no cheaper setting"):
        export(adapted, tiny_tokenizer, tmp_path / "plain", 0.5)
    plain = AutoModelForCausalLM.from_pretrained(export(adapted, tiny_tokenizer, tmp_path / "plain"))
    assert torch.equal(logits(plain), logits(tiny_model()))


def test_a_chain_of_one_is_exported_and_of_two_refused(tiny_tokenizer, tmp_path):
    adapted = Adapted(tiny_model(), Chain([DynaMoE(tile=4, refit=False, router_steps=0)]))
    adapted.method.fit(adapted.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    folder = export(adapted, tiny_tokenizer, tmp_path / "plain", 0.9)
    with one_slice(adapted, 2):
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(adapted))
    with pytest.raises(SettingError, match="a chain of several methods has no plain checkpoint"):
        Chain([DynaMoE(tile=4), Method()]).freeze(adapted.model, 1.0)
