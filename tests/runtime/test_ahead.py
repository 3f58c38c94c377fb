"""Prompts read ahead on our runtime: cache, logits, text and bill are those of the method's own reading."""

from __future__ import annotations

import functools

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.decode import stream
from rheostat.methods import Chain, DynaMoE
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.runtime.ahead import Pieces, before
from rheostat.runtime.batch import Batch
from rheostat.runtime.prefill import Prompt
from rheostat.spending import spend
from tests.methods.kv_prediction.given import given
from tests.runtime.test_generating import assert_same_bill, both
from tests.tiny import tiny_fitted, tiny_windows

LENGTHS = (20, 13, 1)
MASK = torch.tensor([[0] * (20 - n) + [1] * n for n in LENGTHS])
IDS = tiny_windows(3, 20) * MASK
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")


@functools.cache
def chained(exact_tokens: int = 1) -> Adapted:
    """Both dials at work: nested FFNs in a model whose prompts are read ahead."""
    maps = KVPrediction(depths=(1, 2, 3), exact_tokens=exact_tokens)
    nested = DynaMoE(tile=4, router_width=8, router_steps=30)
    return tiny_fitted(Chain([maps, nested]), layers=4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_exact", "rank"), [(1, 1.0), (3, 0.0)])
@torch.inference_mode()
def test_cache_and_logits_are_those_of_the_methods_own_reading(family, num_exact, rank):
    adapted = given(family, exact_tokens=num_exact, rank=rank)
    cache = adapted.method.make_cache(adapted.model)
    runtime = adapted.runtime("native")
    assert runtime is not None
    with spend(native={"kv_prediction": 2.0}):
        wanted = adapted.method.prefill(adapted.model, IDS, MASK, cache)
        batch = Batch.read(runtime, IDS, MASK, adapted.settings("prefill", 3))
    torch.testing.assert_close(batch.logits, wanted, rtol=1e-4, atol=1e-4)
    assert batch.cache.lengths.tolist() == list(LENGTHS)
    for layer, theirs in enumerate(cache.layers):
        for row, length in enumerate(LENGTHS):
            for ours, other in ((batch.cache.keys, theirs.keys), (batch.cache.values, theirs.values)):
                mine = ours[layer, row, :, :length]
                torch.testing.assert_close(mine, other[row, :, -length:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("num_exact", [1, 4])
def test_text_and_bill_of_a_padded_batch(family, num_exact):
    adapted = given(family, exact_tokens=num_exact)
    for compute in (adapted.dial.low, adapted.dial.compute[1], 1.0):
        wanted, billed, found, bill = both(adapted, {"prefill": compute})
        assert torch.equal(wanted, found)
        assert_same_bill(billed, bill)
        assert bill.num_side_tokens == billed.num_side_tokens
        assert (bill.num_side_tokens["auxiliary"] > 0) == (compute < 1)


@pytest.mark.parametrize("num_exact", [1, 3])
def test_a_dial_for_each_row(num_exact):
    adapted = given(exact_tokens=num_exact)
    computes = [adapted.dial.low, 1.0, adapted.dial.compute[1]]
    wanted, billed, found, bill = both(adapted, {"prefill": computes})
    assert torch.equal(wanted, found)
    assert_same_bill(billed, bill)


@pytest.mark.parametrize("setting", [{"kv_prediction": 2.0, "dynamoe": 0.5}, {"kv_prediction": 3.0, "dynamoe": 1e6}])
@pytest.mark.parametrize("num_exact", [1, 3])
def test_with_nested_layers_and_their_routers(setting, num_exact):
    adapted = chained(exact_tokens=num_exact)
    found = []
    for runtime in ("stock", "native"):
        with spend(native=setting) as meter:
            steps = list(stream(adapted, IDS, MASK, max_new_tokens=4, runtime=runtime))
        found += [torch.stack([step.token_ids for step in steps]), meter]
    assert torch.equal(found[0], found[2])
    assert_same_bill(found[1], found[3])
    assert found[3].ffn_fraction < 1
    assert found[3].num_side_tokens["auxiliary"] > 0


def test_one_number_for_a_chain():
    chain = chained()
    for compute in (chain.dial.low, [chain.dial.low, 1.0, (1 + chain.dial.low) / 2]):
        wanted, billed, found, bill = both(chain, compute)
        assert torch.equal(wanted, found)
        assert_same_bill(billed, bill)


def test_rows_of_one_token_only():
    """All tokens are first ones: no router is obeyed, but each is billed as asked."""
    chain = chained()
    ids, mask = IDS[:2, :6], torch.tensor([[0] * 5 + [1]] * 2)
    found = []
    for runtime in ("stock", "native"):
        with spend(native={"kv_prediction": 2.0, "dynamoe": 1e6}) as meter:
            found += [[one.token_ids.tolist() for one in stream(chain, ids, mask, max_new_tokens=2, runtime=runtime)]]
        found.append(meter)
    assert found[0] == found[2]
    assert_same_bill(found[1], found[3])


def test_prompts_too_short_to_be_read_ahead():
    adapted = given(exact_tokens=20)
    wanted, billed, found, bill = both(adapted, {"prefill": adapted.dial.low})
    assert torch.equal(wanted, found)
    assert_same_bill(billed, bill)
    assert bill.num_side_tokens["auxiliary"] == 0


def test_maps_that_change_are_read_again():
    adapted = given()
    before = Batch.read(adapted.runtime("native"), IDS, MASK, {"kv_prediction": torch.full((3,), 3.0)}).logits
    adapted.method.fit(adapted.model, tiny_windows(seed=9), generator=torch.Generator().manual_seed(0))
    after = Batch.read(adapted.runtime("native"), IDS, MASK, {"kv_prediction": torch.full((3,), 3.0)}).logits
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("format", ["bf16", "fp16", "int8"])
@torch.inference_mode()
def test_other_formats_are_near_and_their_bytes_are_counted(format):
    adapted, settings = given(), {"kv_prediction": torch.full((3,), 3.0)}
    exact = Batch.read(adapted.runtime("native", "fp32"), IDS, MASK, settings)
    runtime = adapted.runtime("native", format)
    near = Batch.read(runtime, IDS, MASK, settings)
    assert 0 < float((near.logits - exact.logits).norm() / exact.logits.norm()) < 0.15
    held, maps = runtime.nbytes["prefill"], runtime.ahead.layers[1]
    own = {one.nbytes: one for one in runtime.maps(1).matrices}
    shared = [one for one in own.values() if isinstance(one, torch.Tensor) and one is maps.squeeze]
    assert runtime.maps(1).num_weights == maps.num_weights
    runtime.forms._maps.clear()
    assert held - runtime.nbytes["prefill"] == sum(own) - sum(one.nbytes for one in shared)


@torch.inference_mode()
def test_without_native_code(monkeypatch):
    adapted, settings = given(), {"kv_prediction": torch.full((3,), 2.0)}
    native = Batch.read(adapted.runtime("native"), IDS, MASK, settings).logits
    adapted._runtimes.clear()
    monkeypatch.setattr("rheostat.runtime.forms.library", lambda: None)
    torch.testing.assert_close(Batch.read(adapted.runtime("native"), IDS, MASK, settings).logits, native)


def test_pieces():
    prompt = Prompt.of(IDS, MASK, rows=[4, 0, 2], pasts=[0, 7, 0])
    pieces = Pieces.of(prompt, 3)
    assert pieces.early.lengths == [17, 10, 0]
    assert pieces.late.lengths == [3, 3, 1]
    assert (pieces.early.pasts, pieces.late.pasts) == ([0, 7, 0], [17, 17, 0])
    assert pieces.early.rows == pieces.late.rows == [4, 0, 2]
    assert pieces.late.token_ids.tolist() == [*IDS[0, 17:].tolist(), *IDS[1, 17:].tolist(), int(IDS[2, 19])]
    assert pieces.late.positions.tolist() == [17, 18, 19, 17, 18, 19, 0]
    assert torch.equal(torch.cat([pieces.early.valid, pieces.late.valid], 1), MASK.bool())
    assert pieces.split(None) == (None, None)
    early, late = pieces.split([prompt.token_ids])
    assert torch.equal(early[0], pieces.early.token_ids)
    assert torch.equal(late[0], pieces.late.token_ids)


def test_the_token_before():
    prompt = Prompt.of(IDS, MASK, rows=[4, 0, 2], pasts=[0, 7, 0])
    first = [0, 1, *range(1, 19)]  # itself, and itself after a text's first token
    second = [20, *range(20, 32)]  # itself where the one before was read in an earlier pass
    assert before(prompt).tolist() == [*first, *second, 33]
