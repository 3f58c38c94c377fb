"""Rows that come and go, against a list of them."""

from __future__ import annotations

import random

import pytest
import torch

from rheostat.runtime.engine import Runtime
from rheostat.serve.row_cache import RowCache
from tests.serve.conftest import Tiny


@pytest.fixture
def runtime(tiny: Tiny) -> Runtime:
    found = tiny.adapted.runtime("native", "auto")
    assert found is not None
    return found


def random_row(runtime: Runtime, length: int, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    shape = (len(runtime.weights.layers), runtime.weights.num_kv_heads, length, runtime.weights.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_it_holds_what_a_list_of_rows_would(runtime: Runtime):
    draw, cache = random.Random(0), RowCache(runtime)
    empty, held = cache.allocated, []
    for _ in range(120):
        action = draw.random()
        if action < 0.55 or not held:
            row = random_row(runtime, draw.randint(1, 90), draw)
            cache.append(*row)
            held.append(row)
        elif action < 0.9:
            place = draw.randrange(len(held))
            cache.drop(place)
            last = held.pop()
            if place < len(held):
                held[place] = last
        else:
            cache.reserve(draw.randint(1, 300))
        assert cache.lengths.tolist() == [keys.shape[2] for keys, _ in held]
        for place, (keys, values) in enumerate(held):
            length = keys.shape[2]
            assert torch.equal(cache.keys[:, place, :, :length], keys)
            assert torch.equal(cache.values[:, place, :, :length], values)
    while held:
        cache.drop(0)
        held.pop()
    assert cache.allocated == empty  # the memory has gone back


def test_one_row_by_itself_is_on_the_same_memory(runtime: Runtime):
    draw, cache = random.Random(1), RowCache(runtime)
    for length in (3, 5):
        cache.append(*random_row(runtime, length, draw))
    one = cache.only(1)
    one.keys[0, 0, 0, 4] = 7
    one.lengths += 1
    assert bool((cache.keys[0, 1, 0, 4] == 7).all())
    assert cache.lengths.tolist() == [3, 6]
