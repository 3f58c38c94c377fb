"""Scores against log-probabilities by hand, and methods at each stage that must show in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rheostat.adapted import Adapted
from rheostat.eval.batches import Request, can_choose_rows, plan
from rheostat.eval.scoring import score, score_forward, scores_by_step
from rheostat.methods.base import Method
from rheostat.methods.chain import Chain
from rheostat.spending import spend
from tests.methods.kv_prediction.given import given as predicting
from tests.tiny import CONTRACT_FAMILIES, tiny_adapted, tiny_model

REQUESTS = [
    Request((5, 6, 7, 8), (9,)),
    Request((5, 6, 7, 8), (10, 11, 12)),
    Request((5, 6, 7, 8), (10, 11, 12, 13, 14, 15)),
    Request((20,), (21, 22)),
    Request(tuple(range(30, 60)), (61,)),
    Request(tuple(range(3, 20)), (61, 62)),
    Request((20,), (21, 22)),
]


def by_hand(model: torch.nn.Module, request: Request) -> tuple[float, bool]:
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    own = logs[len(request.context) - 1 : -1]
    total = sum(own[k, token].item() for k, token in enumerate(request.continuation))
    return total, own.argmax(-1).tolist() == list(request.continuation)


def scored(
    adapted: Adapted, requests: list[Request], how=score, compute: float = 1.0, batch_tokens: int = 40, **options
):
    is_shared = can_choose_rows(adapted.method.make_cache(adapted.model))
    found = {}
    with spend(compute, **options), torch.inference_mode():
        for batch in plan(requests, is_shared=is_shared, batch_tokens=batch_tokens):
            found |= how(adapted, requests, batch, 0)
    return [(found[k].log_likelihood, found[k].is_greedy) for k in range(len(requests))]


def greedy(model: torch.nn.Module, context: tuple[int, ...], length: int) -> tuple[int, ...]:
    ids = list(context)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(context) :])


def assert_alike(found, wanted):
    assert [one for _, one in found] == [one for _, one in wanted]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=1e-3)


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
@pytest.mark.parametrize("how", [score, score_forward])
def test_full_compute_scores_as_one_dense_pass_does(family, how):
    model = tiny_model(family)
    requests = [*REQUESTS, Request((5, 6, 7, 8), greedy(model, (5, 6, 7, 8), 4))]
    wanted = [by_hand(model, request) for request in requests]
    assert any(hit for _, hit in wanted)
    adapted = tiny_adapted(family)
    assert_alike(scored(adapted, requests, how), wanted)
    assert_alike(scored(adapted, requests, how, batch_tokens=1), wanted)


def test_the_dial_shows_and_is_paid_for():
    adapted = tiny_adapted()
    with spend(adapted.dial.low) as meter:
        found = scored(adapted, REQUESTS, compute=adapted.dial.low, meter=meter)
    wanted = [by_hand(adapted.model, request) for request in REQUESTS]
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(found, wanted, strict=True))
    assert meter.compute < 1


def test_shared_contexts_are_read_once():
    adapted = Adapted(tiny_model())
    with spend() as meter:
        scored(adapted, REQUESTS[:3], meter=meter)
    assert meter.tokens == 4 + 2 + 5  # the context, and all but the last token of the two longer continuations


@dataclass(frozen=True, kw_only=True)
class Forgetful(Method):
    """Prefills the last two tokens of a prompt only: the rest is masked."""

    name: ClassVar[str] = "forgetful"
    stages: ClassVar[frozenset[str]] = frozenset({"prefill"})

    def prefill(self, model, input_ids, attention_mask, cache):
        attention_mask[:, :-2] = 0
        return super().prefill(model, input_ids, attention_mask, cache)


def test_a_method_that_changes_the_prefill_shows():
    model = tiny_model()
    wanted = [by_hand(model, Request(request.context[-2:], request.continuation)) for request in REQUESTS]
    assert_alike(scored(Adapted(model, Forgetful()), REQUESTS), wanted)


def test_predicted_prompts_show_and_are_billed():
    adapted = predicting()
    low = adapted.dial.low
    with spend(low) as meter:
        found = scored(adapted, REQUESTS, compute=low, meter=meter)
    wanted = []
    with spend(low), torch.no_grad():
        for request in REQUESTS:
            cache = adapted.method.make_cache(adapted.model)
            mask, logs = torch.ones(1, len(request.context), dtype=torch.long), []
            logits = adapted.method.prefill(adapted.model, torch.tensor([request.context]), mask, cache)
            for token in request.continuation:
                logs.append((logits.double().log_softmax(-1)[0, token].item(), int(logits.argmax()) == token))
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                logits = adapted.method.decode(adapted.model, torch.tensor([[token]]), mask, cache)
            wanted.append((sum(log for log, _ in logs), all(hit for _, hit in logs)))
    assert_alike(found, wanted)
    dense = [by_hand(adapted.model, request)[0] for request in REQUESTS]
    differ = [abs(a - b) > 1e-3 for (a, _), b in zip(found, dense, strict=True)]
    assert differ == [len(request.context) > 1 for request in REQUESTS]  # of one token, nothing can be predicted
    assert meter.compute < 1
    # Contexts that are shared are read once; their last tokens are the model's own.
    assert meter.num_side_tokens["auxiliary"] == 3 + 29 + 16
    assert_alike(scored(adapted, REQUESTS), [by_hand(adapted.model, request) for request in REQUESTS])


@dataclass(frozen=True, kw_only=True)
class Hasty(Method):
    """Decodes as the model does, and says so; `last` never comes out."""

    name: ClassVar[str] = "hasty"
    stages: ClassVar[frozenset[str]] = frozenset({"decode"})
    ban: int = -1

    def decode(self, model, token_ids, attention_mask, cache):
        assert token_ids.shape[1] == 1
        assert attention_mask.shape == (len(token_ids), cache.get_seq_length() + 1)
        logits = super().decode(model, token_ids, attention_mask, cache)
        if self.ban >= 0:
            logits[:, self.ban] = -1e4
        return logits


def test_a_method_that_changes_decoding_is_fed_token_by_token():
    model = tiny_model()
    wanted = [by_hand(model, request) for request in REQUESTS]
    adapted = Adapted(model, Hasty())
    assert scores_by_step(adapted.method)
    with spend() as meter:
        assert_alike(scored(adapted, REQUESTS, meter=meter), wanted)
    assert meter.num_decode_tokens == sum(len(request.continuation) - 1 for request in REQUESTS)
    banned = scored(Adapted(tiny_model(), Hasty(ban=12)), REQUESTS)
    worse = [a[0] < b[0] - 1000 for a, b in zip(banned, wanted, strict=True)]
    assert worse == [12 in request.continuation[1:] for request in REQUESTS]


class OwnLayer(DynamicLayer):
    """Inherits `reorder_cache`, so nobody may rely on it."""

    def reorder_cache(self, beam_idx):
        raise AssertionError


OwnLayer.reorder_cache.__module__ = "transformers.cache_utils"


@dataclass(frozen=True, kw_only=True)
class Hoarder(Method):
    """Its cache's rows cannot be chosen."""

    name: ClassVar[str] = "hoarder"
    stages: ClassVar[frozenset[str]] = frozenset({"cache"})

    def make_cache(self, model):
        cache = DynamicCache(config=model.config)
        cache.layers = [OwnLayer() for _ in cache.layers]
        return cache


@pytest.mark.parametrize("methods", [(Hoarder(),), (Hoarder(), Hasty()), (Forgetful(),)])
def test_caches_whose_rows_cannot_be_chosen(methods):
    model = tiny_model()
    keep = 2 if methods == (Forgetful(),) else None
    cut = [Request(r.context[-keep:] if keep else r.context, r.continuation) for r in REQUESTS]
    wanted = [by_hand(model, request) for request in cut]
    assert_alike(scored(Adapted(model, Chain(methods)), REQUESTS), wanted)


def test_what_is_scored_step_by_step():
    @dataclass(frozen=True, kw_only=True)
    class Deep(Method):
        name: ClassVar[str] = "deep"
        stages: ClassVar[frozenset[str]] = frozenset({"depth"})

    assert not scores_by_step(Method())
    assert not scores_by_step(Chain([Forgetful(), Hoarder()]))
    assert scores_by_step(Chain([Forgetful(), Hasty()]))
    assert scores_by_step(Deep())
