"""Sides run what they say they run, and are billed for it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from rheostat.bench import llama
from rheostat.bench.sides import SideSpec, TorchSide, make_side, once, stock_model
from rheostat.cost import decode_cost, dense_cost
from rheostat.errors import SettingError
from rheostat.geometry import Geometry
from tests.bench.test_timing import FakeClock
from tests.tiny import tiny_adapted, tiny_model, tiny_windows


@pytest.fixture(scope="module")
def adapted():
    return tiny_adapted("qwen3")


def written(side, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The tokens [B, new] that a side writes."""
    with side.session():
        state = side.prefill(ids)
        tokens = [state.token_ids]
        for _ in range(new - 1):
            state = side.decode(state)
            tokens.append(state.token_ids)
    return torch.cat(tokens, 1)


def greedy(model, ids: torch.Tensor, **settings) -> torch.Tensor:
    rest = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **rest, **settings)[:, ids.shape[1] :]


def test_stock_writes_what_generate_writes():
    model = tiny_model("llama")
    side = TorchSide(SideSpec(kind="stock", model="m", dtype="float32"), model)
    ids = tiny_windows(2, 12)
    assert torch.equal(written(side, ids, 6), greedy(model, ids))


@pytest.mark.parametrize("is_low", [False, True])
def test_a_dial_writes_what_generate_writes_at_its_setting(adapted, is_low):
    compute = adapted.dial.low if is_low else 1.0
    side = TorchSide(SideSpec(kind="dial", model="m", compute=compute), adapted.model, adapted.method)
    ids = tiny_windows(2, 12)
    assert torch.equal(written(side, ids, 6), greedy(adapted, ids, compute=compute))


def test_the_bill_of_stock_and_of_a_full_dial_is_the_formula(adapted):
    ids = tiny_windows(2, 12)
    for kind, model in (("stock", tiny_model("qwen3")), ("dial", adapted.model)):
        spent = TorchSide(SideSpec(kind=kind, model="m"), model, adapted.method).spent(ids, 5)
        geometry = Geometry.from_config(model.config)
        common = {"itemsize": 4, "num_rows": 2}
        assert spent.prefill == dense_cost(geometry, num_tokens=12, past=0, num_logits=1, **common)
        assert spent.decode == decode_cost(geometry, num_steps=5, past=12, **common)
        assert (spent.num_steps, spent.compute) == (5, 1.0)


def test_a_low_dial_is_billed_less(adapted):
    low = adapted.dial.low
    spent = TorchSide(SideSpec(kind="dial", model="m", compute=low), adapted.model, adapted.method).spent(
        tiny_windows(1, 12), 5
    )
    dense = TorchSide(SideSpec(kind="dial", model="m"), adapted.model, adapted.method).spent(tiny_windows(1, 12), 5)
    assert spent.compute < 0.9
    assert spent.prefill.flops.ffn < dense.prefill.flops.ffn
    assert spent.decode.bytes.ffn < dense.decode.bytes.ffn


class Slow:
    """Reads a prompt in two seconds and a token in half of one."""

    max_rows = None

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.log = clock, []

    def session(self):
        return contextlib.nullcontext()

    def wait(self) -> None:
        self.log.append("wait")

    def prefill(self, ids: torch.Tensor) -> str:
        self.clock.now += 2.0
        self.log.append("prefill")
        return "state"

    def decode(self, state: str) -> str:
        self.clock.now += 0.5
        self.log.append("decode")
        return state


def test_the_first_token_is_the_prompts_and_the_others_are_decoded():
    clock = FakeClock()
    side = Slow(clock)
    assert once(side, tiny_windows(1, 4), 4, clock) == {"first_token": 2.0, "token": 0.5}
    assert side.log == ["wait", "prefill", "wait", "decode", "decode", "decode", "wait"]


# -- making them


def test_the_stock_side_of_a_folder_has_no_hooks(tiny_model_folder: Path):
    side = make_side(SideSpec(kind="stock", model=str(tiny_model_folder), dtype="bfloat16"))
    assert side.model.dtype == torch.bfloat16
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_hooks(side.model))


def tiny_hooks(model) -> list[torch.nn.Module]:
    """Modules, less those that `transformers` itself hooks."""
    plain = {name for name, m in tiny_model("llama").named_modules() if m._forward_hooks or m._forward_pre_hooks}
    return [module for name, module in model.named_modules() if name not in plain]


def test_the_stock_side_of_an_artifact_is_its_plain_checkpoint(tmp_path: Path, adapted, tiny_tokenizer):
    from rheostat.artifact import save

    save(adapted, tiny_tokenizer, tmp_path / "dial")
    model = stock_model(str(tmp_path / "dial"), "float32", "cpu")
    assert type(model) is type(tiny_model("qwen3"))
    ids = tiny_windows(1, 12)
    dial = make_side(SideSpec(kind="dial", model=str(tmp_path / "dial"), dtype="float32"))
    assert torch.equal(written(dial, ids, 4), greedy(model, ids)[:, :4])


def test_an_unknown_kind_is_refused():
    with pytest.raises(SettingError, match="kind='abacus': must be one of stock, dial, native, llama.cpp"):
        make_side(SideSpec(kind="abacus", model="m"))


# -- llama.cpp, with its binding played by a fake


class FakeLlama:
    """Writes token 7 for ever."""

    def __init__(self, **settings) -> None:
        self.settings, self.seen = settings, []

    def reset(self) -> None:
        self.seen = []

    def eval(self, tokens: list[int]) -> None:
        self.seen.append(list(tokens))

    def sample(self, temp: float) -> int:
        assert temp == 0.0
        return 7


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A GGUF file with the matrices of a one-layer model of width 8, FFN 16, vocabulary 11."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(str(path), "llama")
    shapes = {
        "token_embd.weight": (11, 8),
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_gate.weight": (16, 8),
        "blk.0.ffn_down.weight": (8, 16),
        "output_norm.weight": (8,),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_of_a_gguf_file_by_part(gguf: Path):
    weights = llama.Weights.of(gguf)
    assert (weights.attention, weights.ffn) == (2 * 2 * 64, 2 * 2 * 128)
    assert (weights.head, weights.row) == (2 * 88, 2 * 8)  # no output matrix: the head is tied
    assert weights.kind == "F16"


def test_llama_reads_the_prompt_and_then_its_own_tokens(gguf, monkeypatch, tiny_model_folder):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=FakeLlama))
    monkeypatch.setattr(llama, "convert_gguf", lambda path: tiny_model_folder)
    side = make_side(SideSpec(kind="llama.cpp", model=str(gguf), threads=3, context=40))
    assert side.spec.label == "llama.cpp F16"
    assert side.max_rows == 1
    clock = FakeClock()
    ids = tiny_windows(1, 5)
    once(side, ids, 3, clock)
    assert side.llama.seen == [ids[0].tolist(), [7], [7]]
    settings = side.llama.settings
    assert (settings["n_threads"], settings["n_threads_batch"], settings["n_ctx"]) == (3, 3, 40)
    assert settings["n_gpu_layers"] == 0
    spent = side.spent(ids, 2)
    dense = dense_cost(side.geometry, num_tokens=5, past=0, num_logits=1, itemsize=2)
    assert spent.prefill.flops == dense.flops
    assert spent.prefill.bytes.scores == dense.bytes.scores
    assert spent.prefill.bytes.ffn == side.weights.ffn
    assert spent.prefill.bytes.embeddings == 5 * side.weights.row
    assert spent.decode.bytes.ffn == 2 * side.weights.ffn
    assert spent.decode.bytes.head == 2 * side.weights.head


def test_where_the_gguf_file_is_looked_for(gguf: Path, tiny_model_folder: Path, monkeypatch):
    assert llama.find_gguf(str(gguf), None) == gguf
    assert llama.find_gguf(str(tiny_model_folder), None) is None
    made_of = {"small": "digest of small"}
    monkeypatch.setattr(llama, "BUNDLED", made_of)
    monkeypatch.setattr(llama, "load", lambda name: (name, None))
    monkeypatch.setattr(llama, "model_digest", lambda name: made_of[name])
    monkeypatch.setattr(llama, "gguf_file", lambda name: gguf if name == "small" else None)
    assert llama.find_gguf(str(tiny_model_folder), "digest of small") == gguf
    assert llama.find_gguf(str(tiny_model_folder), "of another") is None
