from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rheostat.eval.batches import Request, can_choose_rows, in_rows, left_padded, plan, right_padded, truncated

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=6).map(tuple)
requests = st.lists(st.builds(Request, tokens, tokens), max_size=20)


@given(requests, st.booleans(), st.integers(1, 30))
def test_each_request_is_in_one_batch_with_its_context(asked, is_shared, batch_tokens):
    batches = plan(asked, is_shared=is_shared, batch_tokens=batch_tokens)
    seen = []
    for batch in batches:
        for context, members in zip(batch.contexts, batch.members, strict=True):
            assert members
            assert all(asked[number].context == context for number in members)
            seen += members
        longest = max(len(asked[number].continuation) for members in batch.members for number in members)
        num_rows = sum(map(len, batch.members))
        cells = max(len(batch.contexts) * max(map(len, batch.contexts)), num_rows * longest)
        assert len(batch.contexts) == 1 or cells <= batch_tokens
    assert sorted(seen) == list(range(len(asked)))


@given(requests)
def test_contexts_are_read_once_where_they_can_be_shared(asked):
    contexts = [context for batch in plan(asked, is_shared=True, batch_tokens=8) for context in batch.contexts]
    assert sorted(contexts) == sorted({request.context for request in asked})


@given(requests)
def test_unshared_contexts_follow_one_continuation_each_and_never_meet_shared_ones(asked):
    for batch in plan(asked, is_shared=False, batch_tokens=8):
        lengths = [[len(asked[number].continuation) for number in members] for members in batch.members]
        assert all(length == [1] * len(length) for length in lengths) or all(
            len(length) == 1 and length[0] > 1 for length in lengths
        )


def test_the_longest_come_first_and_the_order_of_requests_does_not_matter():
    asked = [Request((1,) * n, (2,) * (7 - n)) for n in (3, 1, 5)]
    order = [batch.contexts for batch in plan(asked, is_shared=True, batch_tokens=6)]
    assert order[0] == [(1,) * 5]
    assert order == [batch.contexts for batch in plan(asked[::-1], is_shared=True, batch_tokens=6)]


@pytest.mark.parametrize(
    ("context", "continuation", "limit", "left"),
    [(10, 2, 8, 7), (10, 2, 11, 10), (10, 8, 8, 1), (3, 1, 8, 3), (8, 1, 8, 8), (9, 1, 8, 8)],
)
def test_truncation_keeps_what_the_model_can_read(context, continuation, limit, left):
    request = Request(tuple(range(context)), (9,) * continuation)
    cut = truncated(request, limit)
    assert cut.context == request.context[context - left :]
    assert cut.continuation == request.continuation


@given(st.lists(tokens, min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 40), st.integers(1, 4))
def test_prompts_in_rows(prompts, num_more, batch_tokens, max_rows):
    batches = in_rows(prompts, num_more=num_more, batch_tokens=batch_tokens, max_rows=max_rows)
    assert sorted(number for batch in batches for number in batch) == list(range(len(prompts)))
    for batch in batches:
        width = max(len(prompts[number]) for number in batch) + num_more
        assert len(batch) == 1 or (len(batch) <= max_rows and len(batch) * width <= batch_tokens)


def test_padding():
    cpu = torch.device("cpu")
    ids, mask = left_padded([(1, 2, 3), (4,)], 0, cpu)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3], [0, 0, 4]], [[1, 1, 1], [0, 0, 1]])
    ids, mask = right_padded([(1, 2, 3), (4,)], 0, cpu)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]])


class Bare(DynamicLayer):
    """Holds more than keys and values, and inherits `reorder_cache`."""


class Whole(DynamicLayer):
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)


def test_only_caches_that_know_how_have_rows_to_choose():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 0)
    assert can_choose_rows(cache)
    cache.layers[0] = Whole()
    assert can_choose_rows(cache)
    cache.layers[0] = Bare()
    assert not can_choose_rows(cache)
