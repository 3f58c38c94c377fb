"""One layer of a hierarchical cache, through the host's verbs. (`test_hierarchical` has whole caches and models.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rheostat.caches.layer import SPARE, HierarchicalLayer

G = 4


def states(rows: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [rows, 2, tokens, 8]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 8, generator=g), torch.randn(rows, 2, tokens, 8, generator=g)


def layer(padding: list[int] | None = None) -> HierarchicalLayer:
    made = HierarchicalLayer(G, 8)
    made.padding = padding or []
    return made


@given(st.integers(1, 12), st.lists(st.integers(1, 6), max_size=5), st.integers(0, 4))
def test_the_newest_tokens_are_exact_and_the_lengths_add_up(prompt, steps, padded):
    """However they came: at most G - 1 tokens more than the last whole group are kept as they are."""
    padded = min(padded, prompt - 1)
    one, all_states = layer([0, padded]), states(2, prompt + sum(steps))
    seen, start = None, 0
    for number in (prompt, *steps):
        parts = [one_of[:, :, start : start + number] for one_of in all_states]
        seen, start = one.update(*parts), start + number
    assert one.get_seq_length() == start
    assert one.lengths == [start, start - padded]
    for row, (body, buffer) in enumerate(zip(one.body_lengths, one.buffer_lengths, strict=True)):
        assert body + buffer == one.lengths[row]
        assert body % G == 0
        assert buffer < 2 * G
        for got, given_states in zip(seen, all_states, strict=True):
            newest = steps[-1] if steps else prompt
            kept = min(newest, one.lengths[row])  # what just came was read before anything moved
            assert torch.equal(got[row, :, -kept:], given_states[row, :, start - kept : start])


def test_nothing_moves_to_the_body_while_tokens_may_be_taken_back():
    one, (keys, values) = layer(), states(1, 30)
    one.update(keys[:, :, :9], values[:, :, :9])
    assert one.body_lengths == [4]
    one.activate_past_recording()
    one.update(keys[:, :, 9:25], values[:, :, 9:25])
    assert one.body_lengths == [4], "more than the buffer was made for, and all of it still there"
    assert one.buffer_lengths == [21]
    one.crop(-14)
    assert one.get_seq_length() == 11
    assert one.body_lengths == [4]
    one.crop(0)
    assert one.body_lengths == [4]
    with pytest.raises(ValueError, match="8 tokens cannot be taken back"):
        one.crop(-8)
    with pytest.raises(ValueError, match="0 or a negative number"):
        layer().crop(1)


def test_a_buffer_that_grew_for_a_draft_becomes_small_again():
    one, (keys, values) = layer(), states(1, 60)
    one.update(keys[:, :, :9], values[:, :, :9])
    small = one.num_bytes
    one.activate_past_recording()
    one.update(keys[:, :, 9:60], values[:, :, 9:60])
    assert one.num_bytes > small
    one.crop(-50)
    one.update(keys[:, :, :3], values[:, :, :3])
    one.crop(0)
    assert one._buffer[0].shape[2] == 2 * G + SPARE


@pytest.mark.parametrize("indices", [torch.tensor([2, 0]), torch.tensor([True, False, True]), torch.tensor([1, 1, 1])])
def test_rows_are_selected_with_all_that_belongs_to_them(indices):
    one, (keys, values) = layer([0, 3, 1]), states(3, 14)
    one.update(keys, values)
    rows = torch.arange(3)[indices]
    wanted = [part[rows] for part in one.contents()]
    lengths = [one.lengths[row] for row in rows]
    one.batch_select_indices(indices)
    assert one.lengths == lengths
    assert all(torch.equal(a, b) for a, b in zip(one.contents(), wanted, strict=True))


def test_a_reset_layer_is_as_new():
    one, (keys, values) = layer([2]), states(1, 20)
    one.update(keys, values)
    one.reset()
    assert (one.get_seq_length(), one.lengths, one.num_bytes, one.saved_bytes) == (0, [], 0, 0)
    seen = one.update(keys[:, :, :3], values[:, :, :3])
    assert torch.equal(seen[0], keys[:, :, :3])
    assert one.lengths == [3], "padding is forgotten"
