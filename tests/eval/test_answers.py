from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.eval.answers import Answer, answer
from rheostat.methods.base import Method
from rheostat.sampling import Sampling
from rheostat.spending import spend
from tests.eval.test_scoring import Hasty, Hoarder, greedy
from tests.tiny import tiny_adapted, tiny_model

PROMPTS = [(5, 6, 7, 8), (20,), tuple(range(30, 60)), (9, 9, 9)]
LENGTH = 12


def written(adapted: Adapted, *, end_ids=(), is_done=lambda tokens: False, limit=LENGTH, **options) -> list[Answer]:
    with torch.inference_mode():
        return answer(
            adapted,
            PROMPTS,
            max_new_tokens=limit,
            end_ids=end_ids,
            is_done=is_done,
            pad_id=0,
            **({"sampling": Sampling()} | options),
        )


@pytest.mark.parametrize("method", [Method(), Hasty(), Hoarder()])
def test_batches_answer_as_single_rows_do(method):
    model = tiny_model()
    wanted = [greedy(model, prompt, LENGTH) for prompt in PROMPTS]
    found = written(Adapted(model, method))
    assert [one.token_ids for one in found] == wanted
    assert not any(one.is_ended for one in found)


@pytest.mark.parametrize("method", [Method(), Hoarder()])
def test_rows_end_one_by_one(method):
    model = tiny_model()
    whole = [greedy(model, prompt, LENGTH) for prompt in PROMPTS]
    end = whole[0][3]
    found = written(Adapted(model, method), end_ids={end})
    for one, tokens in zip(found, whole, strict=True):
        at = tokens.index(end) if end in tokens else LENGTH
        assert one == Answer(tokens[:at], at < LENGTH)
    stops = written(Adapted(tiny_model(), method), is_done=lambda tokens: tokens[-1] == end)
    for one, tokens in zip(stops, whole, strict=True):
        at = tokens.index(end) + 1 if end in tokens else LENGTH  # what matched stays: the caller cuts the text
        assert one.token_ids == tokens[:at]


def test_rows_that_ended_cost_nothing():
    model = tiny_model()
    with spend() as meter:
        written(Adapted(model), is_done=lambda tokens: True)
    assert meter.num_decode_tokens == 0
    end = greedy(model, PROMPTS[0], 1)[0]
    others = [greedy(model, prompt, 3) for prompt in PROMPTS[1:]]
    assert all(end not in tokens for tokens in others)
    with spend() as meter:
        written(Adapted(tiny_model()), end_ids={end}, limit=3)
    assert meter.num_decode_tokens == 3 * 2


def test_the_dial_changes_what_is_written():
    adapted = tiny_adapted()
    with spend(adapted.dial.low):
        low = written(adapted)
    assert low != written(adapted)


def test_drawn_answers_obey_their_generator():
    adapted = Adapted(tiny_model())

    def draw(seed: int) -> list[Answer]:
        generator = torch.Generator().manual_seed(seed)
        return written(adapted, sampling=Sampling(temperature=5.0), generator=generator)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
