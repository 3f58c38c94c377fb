"""Weight formats: how far logits move, what they hold, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.kernels import library
from rheostat.runtime.batch import Batch
from rheostat.runtime.building import Unsupported
from rheostat.runtime.engine import Runtime
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "int8": 8e-2, "int4": 0.6}
"""Relative error of logits: norm of the difference to norm. The tiny model's random weights are the hardest case."""

IDS = tiny_windows(2, 24)


@torch.inference_mode()
def logits_of(adapted: Adapted, format: str) -> torch.Tensor:
    """Of a prompt and six forced tokens, [B, 7, V]."""
    batch = Batch.read(Runtime(adapted.model, format, adapted.hook_ids), IDS[:, :18], None, {})
    found = [batch.logits]
    found += [batch.step(IDS[:, place].contiguous(), None) for place in range(18, 24)]
    return torch.stack(found, 1)


@pytest.mark.parametrize("format", TOLERANCE)
def test_logits_are_within_the_stated_tolerance(format):
    adapted = Adapted(tiny_model("qwen2"))
    with torch.inference_mode():
        wanted = adapted.model(IDS).logits[:, 17:]
    error = float((logits_of(adapted, format) - wanted).norm() / wanted.norm())
    assert error < TOLERANCE[format]
    assert format == "fp32" or error > TOLERANCE["fp32"]


def test_groups_of_int4_do_not_straddle_experts():
    adapted = tiny_adapted()  # experts of multiples of 16
    with pytest.raises(Unsupported, match="int4"):
        Runtime(adapted.model, "int4", adapted.hook_ids)
    ids = adapted.generate(IDS, max_new_tokens=4, do_sample=False, weights="int4")
    stock = adapted.generate(IDS, max_new_tokens=4, do_sample=False, runtime="stock")
    assert torch.equal(ids, stock)
    with pytest.raises(SettingError, match="int4"):
        adapted.generate(IDS, max_new_tokens=4, do_sample=False, runtime="native", weights="int4")


def test_the_twin_without_native_code(monkeypatch):
    adapted = Adapted(tiny_model())
    native = logits_of(adapted, "int8")
    if library() is None:
        pytest.skip("there is no native code here")
    monkeypatch.setattr("rheostat.runtime.forms.library", lambda: None)
    plain = logits_of(adapted, "int8")
    assert float((plain - native).norm() / native.norm()) < TOLERANCE["int8"]  # ours rounds activations too
    monkeypatch.setattr("rheostat.adapted.library", lambda: None)
    assert adapted.runtime() is None
    assert adapted.runtime("native") is not None


def test_a_model_that_ran_can_be_copied():
    adapted = tiny_adapted()
    ids = adapted.generate(IDS, max_new_tokens=4, do_sample=False, runtime="native")
    assert len(adapted._runtimes) == 1
    twin = copy.deepcopy(adapted._runtimes), pickle.loads(pickle.dumps(adapted._runtimes))
    assert twin == ({}, {})
    assert adapted.runtime("native") is adapted.runtime("auto", "fp32")
    host = adapted.detach()
    assert not adapted._runtimes
    assert torch.equal(host.generate(IDS, max_new_tokens=4, do_sample=False), ids)
