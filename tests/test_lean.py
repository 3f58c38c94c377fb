"""An artifact loaded without `transformers` writes what the one loaded with it writes, and bills the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.artifact import load_artifact, save
from rheostat.decode import stream
from rheostat.errors import SettingError
from rheostat.lean import load_lean
from rheostat.methods import Method, QuantSpec
from rheostat.skeleton import Skeleton, Unknown
from rheostat.spending import spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

HEAVY = ("accelerate", "datasets", "gguf", "huggingface_hub", "peft", "scipy", "sklearn", "sympy", "transformers")
HEAVY_PARTS = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor")
"""What writing an answer must not import: each takes longer than reading a prompt."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return save(tiny_adapted(), tiny_tokenizer, tmp_path_factory.mktemp("lean") / "artifact")


def written(adapted: Adapted, compute: float, weights: str) -> tuple[list[int], int]:
    with spend(compute) as meter:
        steps = list(stream(adapted, tiny_windows(1, 12), max_new_tokens=8, runtime="native", weights=weights))
    return [int(step.token_ids) for step in steps], meter.cost.flops.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [1.0, 0.8])
def test_it_writes_and_bills_what_the_whole_model_does(folder, compute, dtype):
    whole, _ = load_artifact(folder, dtype=dtype)
    lean, _ = load_lean(folder, dtype=dtype)
    assert isinstance(lean.model, Skeleton)
    assert (lean.method, lean.dial, lean.geometry, lean.report) == (
        whole.method,
        whole.dial,
        whole.geometry,
        whole.report,
    )
    state = whole.method.state(whole.model)
    assert all(torch.equal(state[name], tensor) for name, tensor in lean.method.state(lean.model).items())
    for weights in ("auto", "int8"):
        assert written(lean, compute, weights) == written(whole, compute, weights)


def test_a_model_without_a_method_is_left_to_transformers(tiny_tokenizer, tmp_path):
    for method in (Method(), QuantSpec(group_size=8)):
        with pytest.raises(Unknown, match=f"the method {method.name}"):
            load_lean(save(Adapted(tiny_model(), method), tiny_tokenizer, tmp_path / method.name))


def test_another_family_is_left_to_transformers(tiny_tokenizer, tmp_path):
    with pytest.raises(Unknown, match="the family gemma2"):
        load_lean(save(tiny_adapted("gemma2"), tiny_tokenizer, tmp_path / "artifact"))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_missing_settings_are_left_to_transformers(tiny_tokenizer, tmp_path, name):
    folder = save(tiny_adapted(), tiny_tokenizer, tmp_path / "artifact")
    (folder / name).unlink()
    with pytest.raises(Unknown, match=name):
        load_lean(folder)


def test_damage_is_an_error(tiny_tokenizer, tmp_path):
    folder = save(tiny_adapted(), tiny_tokenizer, tmp_path / "artifact")
    with (folder / "method.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(SettingError, match=r"method\.safetensors is not the file that was saved"):
        load_lean(folder)


SCRIPT = """
import json, sys
from rheostat.__main__ import main
status = main(sys.argv[1:])
print(json.dumps([status, sorted(sys.modules)]))
"""


def test_an_answer_imports_nothing_heavy(folder):
    arguments = ["generate", str(folder), "Hello", "--max-new-tokens", "3", "--compute", "0.8", "--runtime", "native"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=300, check=True
    )
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    heavy = {name for name in modules if name.split(".")[0] in HEAVY or name in HEAVY_PARTS}
    assert not heavy
