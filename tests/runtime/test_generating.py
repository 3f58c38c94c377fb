"""`generate` and `stream` on our runtime give what they give on `transformers`: the text, and the bill."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from rheostat.adapted import Adapted
from rheostat.decode import stream
from rheostat.errors import SettingError
from rheostat.meter import Meter
from rheostat.methods import Method
from rheostat.sampling import Sampling
from rheostat.spending import spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

LENGTHS = (20, 13, 6)
MASK = torch.tensor([[0] * (20 - n) + [1] * n for n in LENGTHS])
PROMPTS = tiny_windows(3, 20) * MASK
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def adapted() -> Adapted:
    return tiny_adapted()


def assert_same_bill(a: Meter, b: Meter) -> None:
    """Everything that a meter holds but the clock."""
    assert (a.cost, a.dense) == (b.cost, b.dense)
    assert (a.num_prefill_tokens, a.num_decode_tokens) == (b.num_prefill_tokens, b.num_decode_tokens)
    assert a.layer_fractions() == b.layer_fractions()
    assert a.expert_counts.keys() == b.expert_counts.keys()
    assert all(torch.equal(a.expert_counts[key], b.expert_counts[key]) for key in a.expert_counts)
    assert len(a.passes) == len(b.passes)
    for one, other in zip(a.passes, b.passes, strict=True):
        assert one.phase == other.phase
        assert torch.equal(one.valid, other.valid)
        assert torch.equal(one.ffn_channels, other.ffn_channels)


def both(adapted: Adapted, compute, **settings):
    """Ids and meter on `transformers`, then on ours."""
    found = []
    for runtime in ("stock", "native"):
        torch.manual_seed(7)
        with spend(compute) as meter:
            ids = adapted.generate(PROMPTS, attention_mask=MASK, runtime=runtime, **(GREEDY | settings))
        found += [ids, meter]
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_padded_batch(family, share):
    adapted = tiny_adapted(family)
    compute = 1 - (1 - adapted.dial.low) * (1 - share)
    wanted, billed, given, bill = both(adapted, compute)
    assert len(wanted[:, 20:].unique()) > 3
    assert torch.equal(wanted, given)
    assert_same_bill(billed, bill)
    assert share == 1.0 or bill.compute < 1


@pytest.mark.parametrize("settings", [{"refit": False}, {"target": "class"}, {"num_experts": 2}])
def test_other_experts(settings):
    adapted = tiny_adapted(**settings)
    wanted, billed, given, bill = both(adapted, (1 + adapted.dial.low) / 2)
    assert torch.equal(wanted, given)
    assert_same_bill(billed, bill)


def test_a_plain_model_and_a_window():
    model = tiny_model("mistral")
    model.config.sliding_window = 8
    wanted, billed, given, bill = both(Adapted(model), 1.0)
    assert torch.equal(wanted, given)
    assert_same_bill(billed, bill)


def test_a_dial_for_each_row_and_each_phase(adapted):
    low = adapted.dial.low
    mixed = {"prefill": [1.0, low, (1 + low) / 2], "decode": [low, 1.0, (1 + low) / 2]}
    wanted, billed, given, bill = both(adapted, mixed)
    assert torch.equal(wanted, given)
    assert_same_bill(billed, bill)


def test_rows_of_a_mixed_batch_are_those_of_single_rows(adapted):
    computes = [1.0, adapted.dial.low, (1 + adapted.dial.low) / 2]
    whole = adapted.generate(PROMPTS, attention_mask=MASK, compute=computes, runtime="native", **GREEDY)
    for row, (compute, length) in enumerate(zip(computes, LENGTHS, strict=True)):
        alone = adapted.generate(PROMPTS[row : row + 1, -length:], compute=compute, runtime="native", **GREEDY)
        assert torch.equal(alone[0], whole[row, -length - 12 :])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 1.7},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "top_p": 0.7, "num_return_sequences": 2},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"bad_words_ids": [[5], [9]], "max_length": 30, "max_new_tokens": None},
    ],
)
def test_what_transformers_does_with_logits(adapted, settings):
    wanted, billed, given, bill = both(adapted, 1.0, **settings)
    assert torch.equal(wanted, given)
    assert_same_bill(billed, bill)


def test_ends_within_a_batch(adapted):
    free = adapted.generate(PROMPTS, attention_mask=MASK, runtime="stock", **GREEDY)
    ends = [int(free[0, 22]), int(free[1, 24])]
    wanted, billed, given, bill = both(adapted, 1.0, eos_token_id=ends, pad_token_id=0)
    assert bool((wanted[:, 20:] == 0).any())
    assert torch.equal(wanted, given)
    assert_same_bill(billed, bill)


class Third(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 23)


class Never(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 10:50] = -torch.inf
        return scores


def test_own_criteria_and_processors(adapted):
    settings = {
        "stopping_criteria": StoppingCriteriaList([Third()]),
        "logits_processor": LogitsProcessorList([Never()]),
    }
    wanted, _, given, _ = both(adapted, 1.0, **settings)
    assert torch.equal(wanted, given)
    assert given.shape[1] == 23
    assert not bool(((given[:, 20:] >= 10) & (given[:, 20:] < 50)).any())


def test_stop_strings(tiny_model_folder, tiny_tokenizer):
    from rheostat import load

    adapted = Adapted(load(tiny_model_folder)[0])
    ids = tiny_tokenizer("The river", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "tokenizer": tiny_tokenizer}
    free = adapted.generate(ids, runtime="stock", **settings)
    stop = tiny_tokenizer.decode(free[0, ids.shape[1] + 3 : ids.shape[1] + 5])
    out = [adapted.generate(ids, runtime=name, stop_strings=[stop], **settings) for name in ("stock", "native")]
    assert torch.equal(*out)
    assert out[0].shape[1] < free.shape[1]


def test_a_streamer_sees_prompt_tokens_and_end(adapted):
    class Seen(TextStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.ended = True

    seen = []
    for runtime in ("stock", "native"):
        seen.append(Seen())
        adapted.generate(PROMPTS[:1], streamer=seen[-1], runtime=runtime, **GREEDY)
    assert seen[0].got == seen[1].got
    assert seen[1].ended


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"use_cache": False}, {"return_dict_in_generate": True}, {"cache_implementation": "static"}],
)
def test_the_rest_goes_to_transformers_and_the_log_says_why(adapted, settings, caplog):
    with caplog.at_level(logging.DEBUG, "rheostat.runtime"):
        out = adapted.generate(PROMPTS, attention_mask=MASK, **(GREEDY | settings))
    assert "transformers runs this" in caplog.text
    stock = adapted.generate(PROMPTS, attention_mask=MASK, runtime="stock", **(GREEDY | settings))
    pair = [one if isinstance(one, torch.Tensor) else one.sequences for one in (out, stock)]
    assert torch.equal(*pair)
    with pytest.raises(SettingError, match="native"):
        adapted.generate(PROMPTS, attention_mask=MASK, runtime="native", **(GREEDY | settings))


def test_settings_are_checked(adapted):
    for name in ("runtime", "weights"):
        with pytest.raises(SettingError, match=f"{name}='fast'"):
            adapted.generate(PROMPTS, **{name: "fast"}, **GREEDY)


def test_weights_that_change_are_read_again():
    adapted = Adapted(tiny_model())
    before = adapted.generate(PROMPTS, attention_mask=MASK, runtime="native", **GREEDY)
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    wanted, _, given, _ = both(adapted, 1.0)
    assert torch.equal(wanted, given)
    assert not torch.equal(before, given)


def test_a_hook_of_the_user_is_heard(adapted):
    heard = []
    handle = adapted.model.model.layers[0].self_attn.register_forward_hook(lambda *_: heard.append(1))
    adapted.generate(PROMPTS, attention_mask=MASK, **GREEDY)
    handle.remove()
    assert len(heard) == 12


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_streams_are_alike(adapted, share):
    compute, found = 1 - (1 - adapted.dial.low) * (1 - share), []
    for runtime in ("stock", "native"):
        with spend(compute) as meter:
            steps = stream(
                adapted,
                PROMPTS,
                MASK,
                max_new_tokens=10,
                sampling=Sampling(temperature=1.3, top_k=20),
                generator=torch.Generator().manual_seed(3),
                runtime=runtime,
            )
            found.append([(step.token_ids.tolist(), meter.cost.flops.total, len(meter.passes)) for step in steps])
        found.append(meter)
    assert found[0] == found[2]
    assert_same_bill(found[1], found[3])


def test_the_dial_may_turn_within_a_stream(adapted):
    found = []
    for runtime in ("stock", "native"):
        tokens, meter = [], Meter()
        with spend(1.0, meter=meter):
            steps = stream(adapted, PROMPTS, MASK, max_new_tokens=8, runtime=runtime)
            tokens += [next(steps).token_ids.tolist() for _ in range(3)]
        with spend(adapted.dial.low, meter=meter):
            tokens += [step.token_ids.tolist() for step in steps]
        found += [tokens, meter]
    assert found[0] == found[2]
    assert_same_bill(found[1], found[3])


def test_a_stream_outside_spend_bills_nothing(adapted):
    assert len(list(stream(adapted, PROMPTS, MASK, max_new_tokens=3, runtime="native"))) == 3


def test_one_token_prompts_and_one_new_token(adapted):
    for new in (1, 9):
        ids = torch.tensor([[5], [7]])
        wanted = adapted.generate(ids, runtime="stock", **(GREEDY | {"max_new_tokens": new}))
        given = adapted.generate(ids, runtime="native", **(GREEDY | {"max_new_tokens": new}))
        assert torch.equal(wanted, given)


def test_a_cache_that_outgrows_its_room(adapted):
    settings = GREEDY | {"max_new_tokens": 150}
    wanted = adapted.generate(PROMPTS[:2], runtime="stock", **settings)
    steps = stream(adapted, PROMPTS[:2], max_new_tokens=150, runtime="native")
    given = torch.stack([step.token_ids for step in steps], 1)
    assert torch.equal(wanted[:, 20:], given)


def test_two_models_and_two_threads():
    models = [tiny_adapted(seed=0), tiny_adapted("qwen3", seed=1)]
    wanted = [one.generate(PROMPTS, attention_mask=MASK, runtime="stock", **GREEDY) for one in models]
    given: dict[int, torch.Tensor] = {}

    def run(place: int) -> None:
        given[place] = models[place % 2].generate(PROMPTS, attention_mask=MASK, runtime="native", **GREEDY)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(given[place], wanted[place % 2]) for place in range(6))


class Reader(Method):
    """Reads prompts in its own way: here, the plain one."""

    name = "reader"
    stages = frozenset({"prefill"})


class Dropper(Reader):
    """Keeps less of the prompt."""

    def prefill(self, model, input_ids, attention_mask, cache):
        out = super().prefill(model, input_ids, attention_mask, cache)
        cache.crop(-1)
        return out


def test_a_method_that_reads_the_prompt_hands_over_its_cache():
    adapted = Adapted(tiny_model(), Reader())
    found = []
    for runtime in ("stock", "native"):
        with spend(1.0) as meter:
            steps = stream(adapted, PROMPTS, MASK, max_new_tokens=10, runtime=runtime)
            found += [[step.token_ids.tolist() for step in steps], meter]
    assert found[0] == found[2]
    assert_same_bill(found[1], found[3])
    with pytest.raises(SettingError, match="prefill"):
        adapted.generate(PROMPTS, attention_mask=MASK, runtime="native", **GREEDY)


def test_methods_that_the_runtime_does_not_know_run_on_transformers():
    class Other(Method):
        name = "other"
        stages = frozenset({"cache"})

    adapted = Adapted(tiny_model(), Other())
    assert adapted.runtime() is None
    with pytest.raises(SettingError, match="cache"):
        adapted.runtime("native")
    dropper = Adapted(tiny_model(), Dropper())
    with pytest.raises(SettingError, match="dropped"):
        list(stream(dropper, PROMPTS, max_new_tokens=2, runtime="native"))
