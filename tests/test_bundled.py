"""The real model, a small calibration: the dial holds what it promises on SmolLM2-135M. Minutes on two cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rheostat
from rheostat.adaptation import FitSettings
from rheostat.eval.quality import Run, evaluate
from rheostat.text import pack, read_texts

pytestmark = [pytest.mark.model, pytest.mark.slow]

FIT = FitSettings(windows=12, length=256, dial_windows=4)


@pytest.fixture(scope="module")
def threads():
    """Both cores: the products here are large."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def adapted(threads):
    model, tokenizer = rheostat.load("smollm2-135m")
    method = rheostat.DynaMoE(router_steps=150)
    return rheostat.adapt(model, tokenizer, method, fit=FIT), tokenizer


@pytest.fixture(scope="module")
def windows(adapted):
    return pack(adapted[1], read_texts("builtin:heldout"), length=256, limit=12, seed=5)


def test_full_compute_writes_what_the_original_writes(adapted):
    model, tokenizer = adapted
    original, _ = rheostat.load("smollm2-135m")
    batch = tokenizer(["The capital of France is", "Rivers"], return_tensors="pt", padding=True)
    wanted = original.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False, compute=1.0), wanted)
    with torch.no_grad():
        gap = (model(**batch).logits - original(**batch).logits).abs().max()
    assert gap < 2e-3


def test_router_beats_the_best_static_slices_and_a_random_router(adapted, windows):
    model, _ = adapted
    meters: dict = {}
    evaluate(model, windows, [Run(label="routed", compute=0.8)], meters=meters)
    others = model.method.baselines(model.model, meters["routed"].expert_counts, seed=0)
    runs = [Run(label="routed", compute=0.8), *(Run(label=k, override=v) for k, v in others.items())]
    scores = {score.label: score for score in evaluate(model, windows, runs)}
    assert scores["routed"].ratio < scores["random"].ratio
    assert scores["routed"].ratio < scores["static"].ratio
    assert scores["static"].ffn_fraction >= scores["routed"].ffn_fraction - 0.01


def test_compute_spent_is_close_to_compute_asked(adapted, windows):
    model, _ = adapted
    for asked in (0.9, 0.8, 0.7):
        with rheostat.spend(asked) as meter, torch.no_grad():
            model(input_ids=windows, use_cache=False)
        assert meter.compute == pytest.approx(asked, abs=0.02)


def test_artifact_loads_anywhere_and_slices_export(adapted, windows, tmp_path):
    model, tokenizer = adapted
    rheostat.save(model, tokenizer, tmp_path / "dial")
    again, _ = rheostat.load(tmp_path / "dial")
    ids = windows[:2, :64]
    with torch.no_grad():
        with rheostat.spend(0.8):
            assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        rheostat.export(model, tokenizer, tmp_path / "plain", compute=0.71)
        # A process that never imports rheostat.
        code = (
            "import sys; from transformers import AutoModelForCausalLM as A;"
            "m = A.from_pretrained(sys.argv[1]); print(m.config.intermediate_size);"
            "assert 'rheostat' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "plain"], capture_output=True, text=True, check=True
        )
    assert done.stdout.split()[-1] == "768"
