"""An artifact is read back as it was, or not at all, with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rheostat import artifact
from rheostat.adapted import Adapted
from rheostat.artifact import load_artifact, read_manifest, save
from rheostat.errors import SettingError
from rheostat.methods import Chain, DynaMoE, Method
from rheostat.report import card
from rheostat.spending import spend
from tests.tiny import FAMILIES, tiny_adapted, tiny_model, tiny_windows

IDS = tiny_windows(2, 16)


def logits(adapted: torch.nn.Module, compute: float = 1.0) -> torch.Tensor:
    with torch.no_grad(), spend(compute):
        return adapted(input_ids=IDS).logits


@pytest.fixture(scope="module")
def adapted() -> Adapted:
    adapted = tiny_adapted()
    adapted.report = {"seed": 3, "nested": {"list": [1, 2.5, None]}}
    return adapted


@pytest.fixture
def saved(adapted, tiny_tokenizer, tmp_path) -> Path:
    return save(adapted, tiny_tokenizer, tmp_path / "artifact")


def edit(folder: Path, **changes: object) -> None:
    file = folder / artifact.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_without_a_digest_is_told_in_one_line(saved, name):
    (saved / name).unlink()
    with pytest.raises(SettingError, match=r"model='.*artifact': must be an artifact with all its files"):
        load_artifact(saved)


# -- the round trip


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_after_a_round_trip(family, tiny_tokenizer, tmp_path):
    before = tiny_adapted(family)
    after, _ = load_artifact(save(before, tiny_tokenizer, tmp_path / "artifact"))
    assert after.method == before.method
    assert after.dial == before.dial
    for compute in (1.0, (1 + before.dial.low) / 2, before.dial.low):
        assert torch.equal(logits(after, compute), logits(before, compute))
    state = after.method.state(after.model)
    assert all(torch.equal(state[key], value) for key, value in before.method.state(before.model).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_it_as_the_dense_model(family, tiny_tokenizer, tmp_path):
    before = tiny_adapted(family)
    folder = save(before, tiny_tokenizer, tmp_path / "artifact")
    stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(stock), logits(tiny_model(family)), rtol=1e-4, atol=1e-4)
    assert type(stock).__name__ in stock.config.architectures


@pytest.mark.parametrize(
    "method", [Method(), Chain([DynaMoE(tile=4, router_steps=0, refit=False)])], ids=["dense", "chain"]
)
def test_other_methods_are_saved_too(method, tiny_tokenizer, tmp_path):
    before = Adapted(tiny_model("qwen3"), method)
    before.method.fit(before.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    after, _ = load_artifact(save(before, tiny_tokenizer, tmp_path / "artifact"))
    assert after.method == before.method
    assert torch.equal(logits(after), logits(before))


def test_a_model_card_is_written_and_may_be_edited(saved):
    text = (saved / "README.md").read_text(encoding="utf-8")
    assert text == card.artifact_card(read_manifest(saved), name="artifact")
    assert ModelCard(text).data.library_name == "rheostat"
    (saved / "README.md").write_text("# Mine\n")
    load_artifact(saved)


def test_tokenizer_and_report_come_along(adapted, saved, tiny_tokenizer):
    after, tokenizer = load_artifact(saved)
    assert tokenizer("Hello.")["input_ids"] == tiny_tokenizer("Hello.")["input_ids"]
    assert tokenizer.padding_side == "left"
    assert after.report == adapted.report
    assert AutoTokenizer.from_pretrained(saved).eos_token == "</s>"


def test_the_dtype_can_be_chosen_and_is_saved_as_it_is(saved, tiny_tokenizer, tmp_path):
    half, _ = load_artifact(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    again = save(half, tiny_tokenizer, tmp_path / "half")
    assert {t.dtype for t in load_file(again / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(again).dtype == torch.bfloat16
    # Converted after loading, the model's configuration still says what it was loaded as.
    half.to(torch.float32)
    whole = save(half, tiny_tokenizer, tmp_path / "whole")
    assert AutoModelForCausalLM.from_pretrained(whole).dtype == torch.float32


def test_saving_leaves_the_model_alone(adapted, tiny_tokenizer, tmp_path):
    config, before = adapted.config.to_dict(), logits(adapted, adapted.dial.low)
    save(adapted, tiny_tokenizer, tmp_path / "artifact")
    assert adapted.config.to_dict() == config
    assert torch.equal(logits(adapted, adapted.dial.low), before)


# -- writing


def test_an_older_artifact_is_kept_unless_overwritten(saved, tiny_tokenizer):
    other = tiny_adapted(seed=4)
    with pytest.raises(SettingError, match=r"out=.*must be a folder that does not exist yet"):
        save(other, tiny_tokenizer, saved)
    save(other, tiny_tokenizer, saved, overwrite=True)
    assert torch.equal(logits(load_artifact(saved)[0]), logits(other))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_nothing(adapted, tiny_tokenizer, tmp_path, monkeypatch, error):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(artifact, "save_file", fail)
    with pytest.raises((KeyboardInterrupt, SettingError)):
        save(adapted, tiny_tokenizer, tmp_path / "artifact")
    assert os.listdir(tmp_path) == []


# -- damage


def test_a_newer_format_is_refused(saved):
    edit(saved, format_version=2)
    with pytest.raises(SettingError, match=r"artifact.format_version=2: must be at most 1: upgrade rheostat"):
        load_artifact(saved)


def test_no_format_is_refused(saved):
    edit(saved, format_version="one")
    with pytest.raises(SettingError, match=r"rheostat.json has no format_version"):
        load_artifact(saved)


def test_a_manifest_without_its_keys_is_refused(saved):
    file = saved / artifact.MANIFEST
    file.write_text('{"format_version": 1, "method": {}}')
    with pytest.raises(SettingError, match=r"rheostat.json lacks dial, files, report"):
        load_artifact(saved)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1]"])
def test_a_manifest_that_is_none_is_refused(saved, content):
    (saved / artifact.MANIFEST).write_bytes(content)
    with pytest.raises(SettingError, match=r"artifact='.*artifact': rheostat.json"):
        read_manifest(saved)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"rheostat.json cannot be read"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("name", ["method.safetensors", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(SettingError, match=f"the file {name} is missing"):
        load_artifact(saved)


def test_a_file_that_this_user_may_not_read_is_named(saved, monkeypatch):
    monkeypatch.setattr(artifact.os, "access", lambda file, mode: file.name != "method.safetensors")  # root reads all
    with pytest.raises(SettingError, match=r"the file method.safetensors cannot be read by this user"):
        load_artifact(saved)


@pytest.mark.parametrize("name", ["method.safetensors", "model.safetensors"])
def test_a_truncated_file_is_named_with_its_size(saved, name):
    file = saved / name
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 7)
    with pytest.raises(SettingError, match=f"{name} has {size - 7} bytes, must have {size}: it is damaged"):
        load_artifact(saved)


@pytest.mark.parametrize(("name", "what"), [("method", "its digest differs"), ("model", "its base digest differs")])
def test_a_changed_file_is_told_by_its_digest(saved, name, what):
    file = saved / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        SettingError, match=f"{name}.safetensors is not the file that was saved \\({what}: [0-9a-f]{{12}}"
    ):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "nonsense"}, "method='nonsense': must be one of dense, dynamoe"),
        ({"name": "dynamoe", "nonsense": 1}, "dynamoe.nonsense=1: must be one of the settings"),
        ({"name": "dynamoe", "tile": 0}, "dynamoe.tile=0"),
        ({"name": "chain", "methods": [], "nonsense": 1}, "chain.nonsense=1"),
        ({"name": "dense"}, r"artifact: dense has no tensors, the file has \d+"),
        ({"name": "chain", "methods": [{"name": "dense"}]}, "artifact: tensor 0.* belongs to no method of this chain"),
    ],
)
def test_a_method_that_does_not_fit_is_refused(saved, method, message):
    edit(saved, method=method)
    with pytest.raises(SettingError, match=message):
        load_artifact(saved)


def change_tensors(folder: Path, drop: str = "", add: dict[str, torch.Tensor] | None = None) -> None:
    """Other tensors under a manifest that vouches for them."""
    file = folder / artifact.TENSORS
    tensors = {key: value for key, value in load_file(file).items() if key != drop}
    save_file(tensors | (add or {}), file)
    edit(folder, files={})


def test_tensors_that_do_not_fit_are_named(saved):
    change_tensors(saved, drop="1.router.outer.bias")
    with pytest.raises(SettingError, match=r"tensor 1.router.outer.bias is missing, must be of shape \(3,\)"):
        load_artifact(saved)
    change_tensors(saved, add={"1.router.outer.bias": torch.zeros(2)})
    with pytest.raises(SettingError, match=r"tensor 1.router.outer.bias is of shape \(2,\), must be of shape \(3,\)"):
        load_artifact(saved)
    change_tensors(saved, add={"1.router.outer.bias": torch.zeros(3), "2.order": torch.zeros(1)})
    with pytest.raises(SettingError, match=r"tensor 2.order belongs to no layer of this model"):
        load_artifact(saved)
