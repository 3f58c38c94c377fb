"""Taking back another number of tokens in each row."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from rheostat.caches.hierarchical import HierarchicalCache
from rheostat.caches.rewinding import UNLIMITED, check_rewindable, contents, rewind, roll_right, room
from rheostat.errors import SettingError
from tests.tiny import tiny_model


def test_rows_roll_to_the_right():
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert roll_right(x, torch.tensor([0, 2])).tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # without and with a window
@pytest.mark.parametrize("length", [5, 30])
def test_what_stays_is_what_was_there(family, length):
    config = tiny_model(family).config
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    prompt, new = torch.randn(3, 2, length, 8), torch.randn(3, 2, 4, 8)
    drops = [1, 3, 4]
    for layer in range(2):
        cache.update(prompt, prompt, layer)
    cache.crop(0)
    for layer in range(2):
        cache.update(new, new, layer)
    rewind(cache, drops)
    assert cache.get_seq_length() == length + 3
    whole = torch.cat([prompt, new], 2)
    kept = contents(cache.layers[0])[0]
    for row, drop in enumerate(drops):
        expected = whole[row, :, : length + 4 - drop]
        number = min(kept.shape[2], expected.shape[1], 15)  # of a window of 16, the next token reads 15
        assert number >= min(length, 15)
        assert torch.equal(kept[row, :, -number:], expected[:, -number:])


def test_only_caches_that_can_are_let_through():
    config = tiny_model("gemma3_text").config
    for cache in (DynamicCache(), DynamicCache(config=config), HierarchicalCache(config)):
        check_rewindable(cache)
    with pytest.raises(SettingError, match="past_key_values='StaticCache of Static.*must be a cache that can take"):
        check_rewindable(StaticCache(config=config, max_cache_len=8))


def test_room():
    config = tiny_model().config
    assert room(DynamicCache(config=config), 2) == [UNLIMITED] * 2
    cache = HierarchicalCache(config, group_size=4)
    states = torch.randn(2, 2, 9, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    assert room(cache, 2) == [2, 2]
