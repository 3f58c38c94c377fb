"""The cache: what goes in comes out, also when it grows, is cut back, or takes over another cache."""

from __future__ import annotations

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.runtime.cache import SMALLEST, KVCache

SIZES = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4}


def some(num_rows: int, num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, num_tokens, 3, 4, generator=torch.Generator().manual_seed(seed))


def filled(num_tokens: int, num_rows: int = 2) -> tuple[KVCache, list[torch.Tensor]]:
    """A cache written token by token, and what was written to each layer."""
    cache, written = KVCache(num_rows=num_rows, **SIZES), []
    for place in range(num_tokens):
        for layer in range(2):
            written.append(some(num_rows, 1, 2 * place + layer))
            cache.write(layer, written[-1], -written[-1])
        cache.advance(1)
    return cache, [torch.cat(written[layer::2], 1) for layer in range(2)]


@pytest.mark.parametrize("num_tokens", [1, SMALLEST, SMALLEST + 1, 5 * SMALLEST])
def test_nothing_is_lost_when_it_grows(num_tokens):
    cache, written = filled(num_tokens)
    assert cache.num_slots >= num_tokens
    assert cache.num_slots <= max(SMALLEST, 2 * num_tokens)
    for layer in range(2):
        assert torch.equal(cache.keys[layer, :, :, :num_tokens], written[layer].transpose(1, 2))
        assert torch.equal(cache.values[layer, :, :, :num_tokens], -written[layer].transpose(1, 2))
    assert cache.lengths.tolist() == [num_tokens] * 2


def test_growing_doubles():
    cache = KVCache(num_rows=1, **SIZES)
    cache.reserve(SMALLEST + 1)
    assert cache.num_slots == 2 * SMALLEST
    cache.reserve(1000)
    assert cache.num_slots == 1000


def test_rows_of_unequal_length():
    cache, _ = filled(5)
    cache.truncate(torch.tensor([2, 4]))
    new = some(2, 3, 99)
    cache.write(0, new, new)
    assert torch.equal(cache.keys[0, 0, :, 2:5], new[0].transpose(0, 1))
    assert torch.equal(cache.keys[0, 1, :, 4:7], new[1].transpose(0, 1))


def test_cutting_back_and_writing_again():
    cache, written = filled(9)
    cache.truncate(6)
    assert cache.lengths.tolist() == [6, 6]
    assert torch.equal(cache.keys[1, :, :, :6], written[1][:, :6].transpose(1, 2))
    for wrong in (7, -1, [6, 9]):
        with pytest.raises(SettingError, match="lengths"):
            cache.truncate(torch.tensor(wrong))


def test_taking_over_a_padded_cache():
    cache = KVCache(num_rows=2, **SIZES)
    pairs = [(some(2, 70, layer).transpose(1, 2), some(2, 70, layer + 5).transpose(1, 2)) for layer in range(2)]
    cache.fill(pairs, torch.tensor([0, 30]))
    assert cache.starts.tolist() == [0, 30]
    assert cache.lengths.tolist() == [70, 70]
    assert torch.equal(cache.values[1, :, :, :70], pairs[1][1])
    with pytest.raises(SettingError, match="lengths"):
        cache.truncate(20)  # before the second row's start


def test_bytes():
    cache, _ = filled(10)
    assert cache.nbytes == 2 * 2 * 2 * 3 * SMALLEST * 4 * 4
    assert cache.used_bytes == 2 * 2 * 2 * 3 * 10 * 4 * 4
    half = KVCache(num_rows=2, dtype=torch.float16, **SIZES)
    assert half.nbytes == cache.nbytes // 2
    assert half.used_bytes == 0


def test_a_batch_has_rows():
    with pytest.raises(SettingError, match="num_rows"):
        KVCache(num_rows=0, **SIZES)
