"""The forms of the weights: made once, when they are needed, and counted once."""

from __future__ import annotations

import threading

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.kernels import library
from rheostat.runtime import packing
from rheostat.runtime.batch import Batch
from rheostat.runtime.building import build
from rheostat.runtime.engine import Runtime
from rheostat.runtime.forms import Forms
from rheostat.runtime.weights import DraftForm
from tests.tiny import tiny_model, tiny_windows

IDS = tiny_windows(2, 24)


def forms_of(format: str, draft: DraftForm | None = None) -> Forms:
    """Of a tiny dense model."""
    return Forms(build(tiny_model(), frozenset()), format, draft, None)


def test_memory_is_made_when_needed_and_counted():
    adapted = Adapted(tiny_model())
    runtime = Runtime(adapted.model, "int8", adapted.hook_ids)
    assert runtime.nbytes == {"prefill": 0, "decode": 0}
    batch = Batch.read(runtime, IDS, None, {})
    assert runtime.nbytes["prefill"] > 0
    assert runtime.nbytes["decode"] == 0, "the first token does not wait for packing"
    batch.step(IDS[:, 0].contiguous(), None)
    assert runtime.nbytes["decode"] > 0


def test_several_threads_get_one_form(monkeypatch):
    """The first pass of a server may come from several threads at once; each form is packed by one of them."""
    made, real = [], packing.decode_form
    gate = threading.Barrier(4)

    def count(*args, **kwargs):
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(packing, "decode_form", count)
    forms, found = forms_of("int8"), []

    def ask() -> None:
        gate.wait(timeout=60)
        found.append(forms.decode())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 4
    assert len(made) == 1
    assert all(one is found[0] for one in found)


def test_a_draft_without_a_form_of_its_own_reads_what_decoding_reads():
    forms = forms_of("int8")
    assert forms.draft() is forms.decode()
    assert "draft" not in forms.nbytes


def test_a_draft_packs_only_what_it_names():
    forms = forms_of("int8", DraftForm(places=("ffn",)))
    draft, decode = forms.draft().weights, forms.decode().weights
    assert draft.layers[0].q is decode.layers[0].q
    assert draft.head is decode.head
    assert draft.layers[0].ffn.gate.nbytes < decode.layers[0].ffn.gate.nbytes
    assert 0 < forms.nbytes["draft"] < forms.nbytes["decode"]


def test_panels_that_two_phases_share_are_counted_once():
    if library() is None:
        pytest.skip("there is no native code here")
    forms = forms_of("bf16")
    forms.prefill()
    assert forms.nbytes["decode"] > 0, "decoding's panels serve prompts too"
    assert forms.nbytes["prefill"] < 0.01 * forms.nbytes["decode"]


@torch.inference_mode()
def test_the_tail_is_the_upper_layers_alone():
    forms = forms_of("fp32")
    tail = forms.tail(1)
    assert len(tail.weights.layers) == len(forms.weights.layers) - 1
    assert tail.weights.layers[0].q is forms.decode().weights.layers[1].q
    assert forms.tail(1) is tail
