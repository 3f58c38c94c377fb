"""What a pass is told of its tokens, however the mask comes; `test_counted` and `test_adapted` have the bills."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rheostat.adapted import Adapted
from rheostat.passes import _marks, _plain_mask
from rheostat.spending import current_pass, spend
from tests.tiny import tiny_model, tiny_windows

paddings = st.lists(st.integers(0, 5), min_size=1, max_size=3)


def padded(paddings: list[int], num_tokens: int) -> torch.Tensor:
    """A mask [B, n] with so much padding on the left of each row."""
    return (torch.arange(num_tokens) >= torch.tensor(paddings)[:, None]).long()


def whole(mask: torch.Tensor, num_new: int, kind: torch.dtype) -> torch.Tensor:
    """[B, 1, T, S] as `transformers` makes it of a mask [B, S]: booleans, or numbers to add."""
    size = mask.shape[1]
    causal = torch.arange(size) <= torch.arange(size - num_new, size)[:, None]  # [T, S]
    seen = (causal & mask.bool()[:, None])[:, None]
    return seen if kind == torch.bool else torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)


@given(paddings, st.integers(1, 6), st.integers(0, 6), st.sampled_from([torch.bool, torch.float32, torch.bfloat16]))
def test_a_mask_says_the_same_in_each_of_its_forms(rows, num_new, past, kind):
    mask = padded(rows, past + num_new)
    wanted = mask.bool()
    flat = _plain_mask(mask, len(rows), num_new, past)
    full = _plain_mask(whole(mask, num_new, kind), len(rows), num_new, past)
    by_layer = _plain_mask({"sliding_attention": None, "full_attention": mask}, len(rows), num_new, past)
    assert torch.equal(flat, wanted)
    assert torch.equal(by_layer, wanted)
    assert torch.equal(full[:, past:], wanted[:, past:])
    some = wanted[:, -1]  # a row whose newest token is padding sees nothing, so nothing is known of its past
    assert torch.equal(full[some], wanted[some])


@pytest.mark.parametrize("mask", [None, "flash", torch.ones(1, 3), torch.ones(1, 1, 2, 5), torch.ones(1, 9)])
def test_a_mask_that_says_nothing_of_these_tokens_is_left_aside(mask):
    assert _plain_mask(mask, 1, 1, 4) is None


@given(paddings, st.integers(1, 12), st.integers(1, 11))
def test_each_row_has_one_first_token_however_the_text_is_cut(rows, length, cut):
    cut = min(cut, length)
    mask = padded(rows, length).bool()
    valid, first = _marks(mask, len(rows), length, 0, torch.device("cpu"))
    assert torch.equal(valid, mask)
    assert first.sum(1).tolist() == [int(padding < length) for padding in rows]
    parts = [_marks(mask[:, :cut], len(rows), cut, 0, mask.device)]
    if cut < length:
        parts.append(_marks(mask, len(rows), length - cut, cut, mask.device))
    assert torch.equal(torch.cat([one for one, _ in parts], 1), valid)
    assert torch.equal(torch.cat([one for _, one in parts], 1), first)


def test_without_a_mask_a_text_begins_at_its_beginning():
    for past, wanted in ((0, [True, False, False]), (4, [False] * 3)):
        valid, first = _marks(None, 2, 3, past, torch.device("cpu"))
        assert bool(valid.all())
        assert first.tolist() == [wanted] * 2


def test_hooks_are_known_by_number_and_leave_nothing():
    model = tiny_model()
    before = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())
    adapted = Adapted(model)
    hooks = adapted._hooks
    assert len(hooks.ids) == 4
    with spend(), torch.inference_mode():
        model(tiny_windows(2, 5))
        assert current_pass().valid.shape == (2, 5)
    hooks.remove()
    assert not hooks.ids
    assert sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()) == before
