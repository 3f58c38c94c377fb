"""`generate(..., speculate=...)`: the host's arguments, and what it gives back."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.methods import QuantSpec
from rheostat.speculate.bound import speedup_bound
from rheostat.speculate.lookup import PromptLookup
from rheostat.spending import spend
from tests.conftest import byte_tokenizer
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

MASK = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
PROMPTS = tiny_windows(2, 12) * MASK
GIVEN = {"input_ids": PROMPTS, "attention_mask": MASK, "max_new_tokens": 16, "do_sample": False}


class Seen:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.token_ids += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


@pytest.mark.parametrize("name", ["prompt_lookup", "low_dial", "streaming_llm", "snapkv"])
def test_the_host_s_own_answer_padding_and_all(name):
    adapted = tiny_adapted("qwen3")
    free = adapted.generate(**GIVEN, eos_token_id=None, compute=1.0)
    ends = int(free[0, 16])
    wanted = adapted.generate(**GIVEN, eos_token_id=ends, pad_token_id=0, compute=1.0)
    given = adapted.generate(**GIVEN, eos_token_id=ends, pad_token_id=0, compute=1.0, speculate=name)
    assert torch.equal(given, wanted)


def test_the_method_s_own_draft():
    adapted = Adapted(tiny_model("qwen3"), QuantSpec(group_size=4, weight_group_size=8))
    wanted = adapted.generate(**GIVEN, eos_token_id=None)
    with spend() as meter:
        assert torch.equal(adapted.generate(**GIVEN, eos_token_id=None, speculate="self", draft_length=3), wanted)
    assert len(meter.speculation.drafted) == 3
    assert meter.cost.flops.draft > 0


def test_a_streamer_gets_the_prompt_and_every_token():
    adapted, seen = Adapted(tiny_model()), Seen()
    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in GIVEN.items()}
    out = adapted.generate(**one, speculate="prompt_lookup", streamer=seen, eos_token_id=None)
    assert seen.token_ids == out[0].tolist()
    assert seen.has_ended


def test_a_stop_string():
    model = tiny_model("qwen3")
    adapted, tokenizer = Adapted(model), byte_tokenizer()
    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in GIVEN.items()}
    free = adapted.generate(**one, eos_token_id=None)[0, 12:]
    stop = tokenizer.decode(free[4:6])
    settings = {"stop_strings": stop, "tokenizer": tokenizer, "eos_token_id": None}
    assert torch.equal(
        adapted.generate(**one, **settings, speculate="prompt_lookup"), adapted.generate(**one, **settings)
    )


def test_sampling_follows_the_arguments():
    adapted = Adapted(tiny_model("llama"))
    draws = [
        adapted.generate(
            **GIVEN | {"do_sample": True},
            temperature=5.0,
            top_k=0,
            eos_token_id=None,
            speculate=PromptLookup(),
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculate": "magic"}, "speculate='magic': must be one of self, low_dial, prompt_lookup"),
        ({"speculate": "self"}, "speculate='self': must be another drafter: dense has no draft of its own"),
        ({"speculate": "low_dial"}, "speculate='low_dial': must be another drafter: this model's dial"),
        ({"speculate": "prompt_lookup", "num_beams": 4}, "num_beams: has no meaning with speculate"),
        ({"speculate": "prompt_lookup", "draft_length": 0}, "draft_length=0"),
        ({"speculate": "prompt_lookup", "input_ids": None}, "input_ids=None: must be given"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    adapted = Adapted(tiny_model())
    with pytest.raises(SettingError, match=message):
        adapted.generate(**GIVEN | arguments)


def test_a_draft_compute_below_the_dial_is_refused():
    with pytest.raises(SettingError, match="draft_compute=0.01: must be between"):
        tiny_adapted().generate(**GIVEN, speculate="low_dial", draft_compute=0.01)


def test_the_bound_by_hand():
    # 6 drafts of a quarter and a check of half the bytes, all accepted: 7 tokens for 2 reads.
    assert speedup_bound(acceptance=1, draft_length=6, plain_bytes=8, draft_bytes=2, check_bytes=4) == 3.5
    assert speedup_bound(acceptance=0, draft_length=4, plain_bytes=8, draft_bytes=8, check_bytes=8) == 0.2


@pytest.mark.model
def test_the_real_model_drafts_for_itself():
    """Greedy text of the bundled model on an 8-bit cache, over a flush, from a prompt longer than the buffer."""
    import rheostat

    model, tokenizer = rheostat.load("smollm2-135m", dtype="float32")
    adapted = Adapted(model, QuantSpec(group_size=16, remember_views=True))
    text = "The river runs to the sea, and the sea feeds the clouds that feed the river. " * 4
    prompt = tokenizer(text, return_tensors="pt")
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    wanted = adapted.generate(**prompt, **settings)
    for name, least in (("self", 0.5), ("prompt_lookup", 0.25)):
        with spend() as meter:
            assert torch.equal(adapted.generate(**prompt, **settings, speculate=name), wanted)
        assert meter.speculation.acceptance > least


def test_generation_settings_that_the_loop_cannot_follow_are_refused():
    adapted = Adapted(tiny_model())
    given = GIVEN | {"speculate": "prompt_lookup", "eos_token_id": None}
    wanted = adapted.generate(**given)
    adapted.generation_config.min_p = 0.2  # of no meaning where nothing is drawn
    assert torch.equal(adapted.generate(**given), wanted)
    with pytest.raises(SettingError, match=r"generation_config.min_p=0.2: must be 0.0 with speculate"):
        adapted.generate(**given | {"do_sample": True})
    adapted.generation_config.repetition_penalty = 1.3
    with pytest.raises(SettingError, match=r"generation_config.repetition_penalty=1.3: must be 1.0 with speculate"):
        adapted.generate(**given)
    assert torch.equal(adapted.generate(**given, repetition_penalty=1.0), wanted)
    with pytest.raises(SettingError, match="repetition_penalty: has no meaning with speculate"):
        adapted.generate(**given, repetition_penalty=1.3)


def test_stop_strings_of_the_generation_settings_stop():
    adapted, tokenizer = Adapted(tiny_model("qwen3")), byte_tokenizer()
    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in GIVEN.items()}
    given = one | {"speculate": "prompt_lookup", "tokenizer": tokenizer, "eos_token_id": None}
    stop = tokenizer.decode(adapted.generate(**given)[0, 16:18])
    wanted = adapted.generate(**given, stop_strings=[stop])
    adapted.generation_config.stop_strings = [stop]
    assert torch.equal(adapted.generate(**given), wanted)
    assert wanted.shape[1] < 12 + 16
