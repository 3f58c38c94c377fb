"""The real model after predicted prompts, in all that `generate` offers. Minutes on two cores."""

from __future__ import annotations

import pytest
import torch
from transformers import TextIteratorStreamer

import rheostat
from rheostat.adaptation import FitSettings
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.spending import spend

pytestmark = [pytest.mark.model, pytest.mark.slow]

TEXTS = [
    "The capital of France is",
    "Rivers",
    "When the ship came into the harbour that evening, nobody on the quay had",
]
FIRST = [{"role": "user", "content": "Name one colour of the flag of Italy."}]
SECOND = [{"role": "user", "content": "And another one?"}]
RUNTIMES = ["stock", "native"]


@pytest.fixture(scope="module")
def adapted():
    model, tokenizer = rheostat.load("smollm2-135m")
    fit = FitSettings(windows=12, length=256, dial_windows=2)
    return rheostat.adapt(model, tokenizer, KVPrediction(depths=(0.5,)), fit=fit), tokenizer


def write(adapted, ids, **options):
    """Greedy, after a predicted prompt."""
    compute = {"prefill": adapted.dial.low}
    return adapted.generate(ids, compute=compute, **{"max_new_tokens": 10, "do_sample": False, **options})


def rows(tokenizer):
    return [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_padded_batch_is_what_its_rows_are_alone(adapted, runtime, beams):
    model, tokenizer = adapted
    if beams > 1 and runtime == "native":
        pytest.skip("beams run on transformers")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    options = {"runtime": runtime, "num_beams": beams, "min_new_tokens": 10}
    together = write(model, batch.input_ids, attention_mask=batch.attention_mask, **options)
    for row, ids in zip(together, rows(tokenizer), strict=True):
        assert torch.equal(row[-ids.shape[1] - 10 :], write(model, ids, **options)[0])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_prompt_of_one_token_is_the_dense_models(adapted, runtime):
    model, tokenizer = adapted
    ids = rows(tokenizer)[1][:, :1]
    with spend() as meter:
        out = write(model, ids, runtime=runtime)
    assert torch.equal(out, model.generate(ids, max_new_tokens=10, do_sample=False, compute=1.0, runtime=runtime))
    assert meter.num_side_tokens["auxiliary"] == 0


def test_a_conversation_is_what_a_plain_loop_writes(adapted):
    model, tokenizer = adapted
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids = tokenizer.apply_chat_template(FIRST, **options).input_ids
    cache = model.method.make_cache(model.model)
    first = write(model, ids, past_key_values=cache)
    told = [*FIRST, {"role": "assistant", "content": tokenizer.decode(first[0, ids.shape[1] :])}, *SECOND]
    after = tokenizer.apply_chat_template(told, **options).input_ids
    turn = torch.cat([first, after[:, -12:]], 1)  # the cache holds the first turn as it was written
    second = write(model, turn, past_key_values=cache)

    held = model.method.make_cache(model.model)
    wanted = plain_loop(model, held, ids)
    assert torch.equal(first, wanted)
    assert torch.equal(second, plain_loop(model, held, turn))


def plain_loop(adapted, cache, ids, new=10):
    """Greedy, token by token, with the method's own touchpoints; reads what `cache` does not hold yet."""
    mask, ends = torch.ones_like(ids), torch.tensor(adapted.generation_config.eos_token_id)
    with torch.no_grad(), spend({"prefill": adapted.dial.low}):
        logits = adapted.method.prefill(adapted.model, ids[:, cache.get_seq_length() :], mask, cache)
        for left in range(new, 0, -1):
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            if left == 1 or torch.isin(ids[0, -1], ends):
                return ids
            logits = adapted.method.decode(adapted.model, ids[:, -1:], torch.ones_like(ids), cache)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_streams_and_both_runtimes_say_the_same(adapted, runtime):
    model, tokenizer = adapted
    ids = rows(tokenizer)[2]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    with spend() as meter:
        out = write(model, ids, runtime=runtime, streamer=streamer)
    assert meter.num_side_tokens["auxiliary"] == ids.shape[1] - 1
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])
    assert torch.equal(out, write(model, ids, runtime="stock"))
