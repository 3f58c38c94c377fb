"""GGUF files: what is converted is what was written, once, and nothing half-written is left."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rheostat import conversion
from rheostat.conversion import cache_folder, convert_gguf
from rheostat.errors import SettingError
from rheostat.folders import NOTICE
from rheostat.models import load
from tests.given_checkpoints import IDS, refuse, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_gives_the_model_that_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    written = write_gguf(tmp_path / "tiny.gguf")
    capsys.readouterr()
    model, tokenizer = load(tmp_path / "tiny.gguf")
    assert capsys.readouterr() == ("", "")
    assert torch.allclose(model(IDS).logits, written(IDS).logits, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "A tiny title" not in model.config.to_json_string()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length) == (
        "left",
        "<|im_end|>",
        64,
    )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert chat == "<|im_start|>a<|im_end|>"
    model.save_pretrained(tmp_path / "saved")  # a model read from GGUF itself refuses


def test_gguf_splits_at_digits_where_the_vocabulary_did(tmp_path: Path):
    # On its own, transformers 5.23 gives the second answer for both.
    write_gguf(tmp_path / "smollm.gguf")
    write_gguf(tmp_path / "gpt2.gguf", pre="gpt-2")
    _, split = load(tmp_path / "smollm.gguf")
    _, plain = load(tmp_path / "gpt2.gguf")
    assert split.convert_ids_to_tokens(split("a\n\n1").input_ids) == ["a", "ĊĊ", "1"]
    assert plain.convert_ids_to_tokens(plain("a\n\n1").input_ids) == ["a", "Ċ", "Ċ", "1"]


def test_gguf_is_not_mixed_with_its_neighbours(tmp_path: Path):
    written = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    assert torch.allclose(load(tmp_path / "tiny.gguf")[0](IDS).logits, written(IDS).logits, atol=1e-5)


def test_gguf_is_converted_once_for_each_content(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(NOTICE, "rheostat")
    write_gguf(tmp_path / "tiny.gguf")
    first = convert_gguf(tmp_path / "tiny.gguf")
    assert first.parent == cache
    assert [r.message for r in caplog.records] == [f"converting tiny.gguf, once; the copy goes to {first}"]
    stamp = json.loads((first / conversion.STAMP).read_text())
    assert stamp["source"] == "tiny.gguf"
    assert first.name == f"tiny-{stamp['sha256'][:16]}"
    shutil.move(tmp_path / "tiny.gguf", tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "moved", tmp_path / "elsewhere" / "tiny.gguf")
    assert convert_gguf(tmp_path / "elsewhere" / "tiny.gguf") == first
    assert len(caplog.records) == 1
    write_gguf(tmp_path / "elsewhere" / "tiny.gguf", pre="gpt-2")
    assert convert_gguf(tmp_path / "elsewhere" / "tiny.gguf") != first
    monkeypatch.setattr(conversion, "CONVERSION", conversion.CONVERSION + 1)
    convert_gguf(tmp_path / "elsewhere" / "tiny.gguf")
    assert len(caplog.records) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", conversion.STAMP])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, cache: Path, file: str, damage: str):
    written = write_gguf(tmp_path / "tiny.gguf")
    path = convert_gguf(tmp_path / "tiny.gguf") / file
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, size - 10)
    model, _ = load(tmp_path / "tiny.gguf")
    assert torch.allclose(model(IDS).logits, written(IDS).logits, atol=1e-5)
    assert path.stat().st_size == size
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 3000, -1])
def test_a_truncated_gguf_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, keep: int):
    write_gguf(tmp_path / "tiny.gguf")
    size = (tmp_path / "tiny.gguf").stat().st_size
    os.truncate(tmp_path / "tiny.gguf", keep % size)
    refuse(tmp_path / "tiny.gguf", f"model='{tmp_path / 'tiny.gguf'}'", "GGUF")
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError("disk full")])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    write_gguf(tmp_path / "tiny.gguf")

    def interrupted(_: LlamaForCausalLM, folder: Path) -> None:
        Path(folder, "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(SettingError if isinstance(error, OSError) else error) as caught:
        convert_gguf(tmp_path / "tiny.gguf")
    assert not list(cache.iterdir())
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"RHEOSTAT_CACHE='{cache}'")
        assert "disk full" in str(caught.value)


def test_two_conversions_at_once_end_with_one_copy(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(tmp_path / "tiny.gguf")
    plain_copy = conversion._plain_copy

    def overtaken(model: LlamaForCausalLM) -> LlamaForCausalLM:
        monkeypatch.setattr(conversion, "_plain_copy", plain_copy)
        convert_gguf(tmp_path / "tiny.gguf")  # as if by another process
        return plain_copy(model)

    monkeypatch.setattr(conversion, "_plain_copy", overtaken)
    folder = convert_gguf(tmp_path / "tiny.gguf")
    assert list(cache.iterdir()) == [folder]
    assert load(folder)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "tiny.gguf"))
    refuse(tmp_path / "tiny.gguf", "RHEOSTAT_CACHE=", "written")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert cache_folder() == Path(os.environ["RHEOSTAT_CACHE"])
    monkeypatch.delenv("RHEOSTAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/rheostat")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "rheostat"
