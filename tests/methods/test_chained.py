"""`benchmarks/chained.py` from end to end, on tiny artifacts."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rheostat
from rheostat.adapted import Adapted
from rheostat.calibration import calibrate
from rheostat.methods import Chain, DynaMoE, KVPrediction
from rheostat.methods.base import Method
from tests.tiny import tiny_windows

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "chained.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("chained", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, tiny_model_folder, tiny_tokenizer) -> list[str]:
    """The same model with each method alone."""
    methods: list[Method] = [KVPrediction(depths=(1,)), DynaMoE(tile=4, router_width=8, router_steps=5)]
    folders = []
    for method in methods:
        adapted = Adapted(AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval(), method)
        method.fit(adapted.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
        adapted.dial = calibrate(adapted, tiny_windows(2, seed=1))
        folders.append(str(tmp_path_factory.mktemp("chained") / method.name))
        rheostat.save(adapted, tiny_tokenizer, folders[-1])
    return folders


@pytest.fixture(scope="module")
def ran(program, artifacts, tiny_text, tmp_path_factory):
    """What it printed, and the chain that it saved."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("chain") / "made"
    given = ["--held-out", str(tiny_text), "--dial-windows", "2", "--length", "64", "--answer", "16"]
    given += ["--data", f"rivers={tiny_text}", "--windows", "3", "--computes", "0.95,0.8,0.7", "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        program.main([*artifacts, *given, "--dtype", "float32"])
    return json.loads(printed.getvalue().splitlines()[-1]), out


def test_the_chain_is_saved_with_its_joint_dial(ran):
    figures, out = ran
    chain, _ = rheostat.load(str(out))
    assert isinstance(chain.method, Chain)
    assert chain.dial.to_dict() == figures["dials"]["chain"]
    assert set(figures["dials"]) == {"chain", "kv_prediction", "dynamoe"}
    low = {name: min(dial["compute"]) for name, dial in figures["dials"].items()}
    assert low["chain"] < low["kv_prediction"]


def test_each_method_alone_leaves_the_other_neutral(ran):
    for row in ran[0]["quality"]["rivers"]:
        if row["side"] in ("kv_prediction", "dynamoe"):
            (other,) = {"kv_prediction", "dynamoe"} - {row["side"]}
            assert row["native"][other] == 0.0
            assert row["native"][row["side"]] > 0.0


def test_rows_say_what_was_spent_and_start_from_the_dense_model(ran):
    dense, *rows = ran[0]["quality"]["rivers"]
    assert (dense["side"], dense["spent"], dense["ratio"], dense["apart"]) == ("dense", 1.0, 1.0, [0.0] * 3)
    assert {row["side"] for row in rows} == {"chain", "kv_prediction", "dynamoe"}
    for row in rows:
        assert len(row["nats"]) == 3
        assert row["spent"] < 1
        assert row["spent"] == pytest.approx(row["asked"], abs=0.15)
        assert min(row["apart"]) > 0
        more = sum(a - b for a, b in zip(row["nats"], dense["nats"], strict=True)) / 3
        assert row["ratio"] == pytest.approx(math.exp(more), abs=1e-3)


def test_it_scores_what_the_model_would_write(program, artifacts, tiny_text):
    """The answer's losses at the neutral setting are those of one plain pass."""
    adapted, _, _ = program.chain_of(artifacts, torch.float32)
    windows = tiny_windows(2, 40, seed=4)
    with torch.no_grad():
        logits = program.answer_logits(adapted, windows, 9)
        plain = adapted.detach()(windows).logits[:, -10:-1]
    assert torch.allclose(logits, plain, atol=1e-4)


@torch.no_grad()
def test_each_method_computes_in_the_chain_what_it_does_alone(program, artifacts):
    chain, dials, _ = program.chain_of(artifacts, torch.float32)
    windows = tiny_windows(2, 40, seed=4)
    for folder, dial in zip(artifacts, dials, strict=True):
        alone, _ = rheostat.load(folder)
        (name,) = dial.settings
        native = {name: dial.settings[name][-1]}
        with rheostat.spend(native=native):
            expected = program.answer_logits(alone, windows, 9)
        with rheostat.spend(native=native):
            found = program.answer_logits(chain, windows, 9)
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(found, program.answer_logits(chain, windows, 9), atol=1e-2)


def test_methods_of_different_models_are_refused(program, artifacts, tmp_path, tiny_tokenizer):
    adapted, _ = rheostat.load(artifacts[0])
    adapted.report["base_digest"] = "another"
    rheostat.save(adapted, tiny_tokenizer, str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="different models"):
        program.chain_of([str(tmp_path / "other"), artifacts[1]], torch.float32)
