"""The stream gives what `generate` gives, token by token."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.decode import stream
from rheostat.errors import SettingError
from rheostat.methods import Method
from rheostat.sampling import Sampling
from rheostat.spending import spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

LENGTHS = (20, 13, 6)
MASK = torch.tensor([[0] * (20 - n) + [1] * n for n in LENGTHS])
PROMPTS = tiny_windows(3, 20) * MASK


def streamed(adapted: Adapted, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings) -> torch.Tensor:
    """All tokens [B, new] of a stream."""
    return torch.stack([step.token_ids for step in stream(adapted, ids, mask, **settings)], 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_greedy_equals_generate_on_a_padded_batch(family, share):
    adapted = tiny_adapted(family)
    compute = 1 - (1 - adapted.dial.low) * (1 - share)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = adapted.generate(input_ids=PROMPTS, attention_mask=MASK, compute=compute, **settings)[:, 20:]
    assert len(wanted.unique()) > 3
    with spend(compute) as meter:
        given = streamed(adapted, PROMPTS, MASK, max_new_tokens=12)
    assert torch.equal(given, wanted)
    assert meter.num_prefill_tokens == sum(LENGTHS)
    assert meter.num_decode_tokens == 3 * 11  # the last token is not read back
    fractions = [len(meter.token_fractions(row)) for row in range(3)]
    assert fractions == [n + 11 for n in LENGTHS]


def test_a_row_stops_at_its_end_token_and_repeats_it():
    adapted = Adapted(tiny_model("gemma3_text"), Method())
    free = streamed(adapted, PROMPTS, MASK, max_new_tokens=8)
    end = int(free[0, 1])
    assert end not in (free[0, 0], free[0, 2])  # left alone, the row would go on with something else
    steps = list(stream(adapted, PROMPTS, MASK, max_new_tokens=8, eos_token_ids=(end,)))
    tokens = torch.stack([step.token_ids for step in steps], 1)
    ended = torch.stack([step.is_last for step in steps], 1)
    assert torch.equal(ended, (tokens == end).long().cumsum(1) > 0)
    assert tokens[0, 1:].eq(end).all()
    assert tokens.shape[1] == 8
    for row in (1, 2):  # the others go on as if alone, until they end too
        n = int((~ended[row]).sum())
        assert torch.equal(tokens[row, :n], free[row, :n])


def test_the_stream_ends_when_all_rows_have():
    adapted = Adapted(tiny_model("gemma3_text"), Method())
    free = streamed(adapted, PROMPTS, MASK, max_new_tokens=8)
    ends = tuple(free[:, 1].tolist())
    steps = list(stream(adapted, PROMPTS, MASK, max_new_tokens=8, eos_token_ids=ends))
    assert len(steps) <= 2
    assert steps[-1].is_last.all()


def test_one_token_asks_for_one_pass():
    adapted = Adapted(tiny_model(), Method())
    with spend() as meter:
        assert streamed(adapted, PROMPTS[:1], max_new_tokens=1).shape == (1, 1)
    assert meter.num_decode_tokens == 0
    assert len(meter.passes) == 1


def test_seconds_grow():
    steps = list(stream(Adapted(tiny_model(), Method()), PROMPTS[:1], max_new_tokens=4))
    seconds = [step.seconds for step in steps]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_sampling_is_fixed_by_the_generator():
    adapted = Adapted(tiny_model("llama"), Method())
    for p in adapted.parameters():  # flatter, or chance has nothing to choose
        p.data.mul_(0.5)
    draws = [
        streamed(
            adapted,
            PROMPTS,
            MASK,
            max_new_tokens=10,
            sampling=Sampling(temperature=2.0),
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_mask_of_booleans_will_do():
    adapted = Adapted(tiny_model("qwen3"), Method())
    ints = streamed(adapted, PROMPTS, MASK, max_new_tokens=5)
    assert torch.equal(streamed(adapted, PROMPTS, MASK.bool(), max_new_tokens=5), ints)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids=\(1, 0\): must be of shape \[B, T\]"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids=\(3,\)"),
        ({"input_ids": PROMPTS, "max_new_tokens": 0}, "max_new_tokens=0: must be 1 or more"),
        ({"input_ids": PROMPTS, "attention_mask": MASK.flip(1)}, "attention_mask=.*with padding on the left only"),
        ({"input_ids": PROMPTS, "attention_mask": MASK[:, 1:]}, r"attention_mask=.*must be \[3, 20\]"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    adapted = Adapted(tiny_model(), Method())
    with pytest.raises(SettingError, match=message):
        next(stream(adapted, **arguments))
