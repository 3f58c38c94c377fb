"""The quantised body: rows grow apart, and what was stored is never touched again."""

from __future__ import annotations

import pytest
import torch

from rheostat.caches.body import Body, resized
from rheostat.caches.planes import dequantise, quantise

GROUP = {-2: 4, -1: 8}
"""Axis -> numbers of a group: tokens of keys, channels of values."""


def states(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def alone(one: torch.Tensor, axis: int, bits: int) -> torch.Tensor:
    """`one` as it is read back when nothing else is stored."""
    planes = quantise(one, axis, GROUP[axis])
    return dequantise(planes, axis, GROUP[axis], bits)


@pytest.mark.parametrize("axis", [-1, -2])
def test_rows_grow_apart_and_read_as_each_alone(axis):
    body = Body(axis, GROUP[axis], 2)
    first, second = states(3, 8), states(1, 4, seed=1)
    body.put([0, 1, 2], 3, 0, first)
    body.put([1], 3, 8, second)
    for bits in (4, 8):
        seen = body.read(bits)
        assert seen.shape == (3, 2, 12, 16)
        torch.testing.assert_close(seen[:, :, :8], alone(first, axis, bits))
        torch.testing.assert_close(seen[1:2, :, 8:], alone(second, axis, bits))


@pytest.mark.parametrize("axis", [-1, -2])
def test_growing_leaves_what_is_stored_as_it_was(axis):
    body = Body(axis, GROUP[axis], 2)
    body.put([0, 1], 2, 0, states(2, 4))
    before = body.read(8)
    body.put([0], 2, 4, 100 * states(1, 8, seed=2))
    assert torch.equal(body.read(8)[:, :, :4], before)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_single_plane_takes_half_the_nibbles_and_reads_as_four_bits(axis):
    two, one = Body(axis, GROUP[axis], 2), Body(axis, GROUP[axis], 1)
    for body in (two, one):
        body.put([0], 1, 0, states(1, 8))
    assert torch.equal(one.read(4), two.read(4))
    assert two.num_bytes - one.num_bytes == 2 * 8 * 16 // 2


def test_rows_are_selected_in_the_order_asked_for():
    body = Body(-2, 4, 2)
    body.put([0, 1, 2], 3, 0, states(3, 4))
    seen = body.read(8)
    body.select([2, 0, 0], 4)
    assert torch.equal(body.read(8), seen[[2, 0, 0]])


@pytest.mark.parametrize("axis", [-1, -2])
def test_what_only_longer_rows_held_is_let_go(axis):
    body = Body(axis, GROUP[axis], 2)
    body.put([0, 1], 2, 0, states(2, 8))
    body.put([1], 2, 8, states(1, 8, seed=1))
    seen = body.read(8)
    body.select([0], 8)
    assert torch.equal(body.read(8), seen[:1, :, :8])
    body.select([0], 0)
    assert body.num_bytes == 0


def test_an_empty_body_has_no_bytes():
    assert Body(-1, 8, 2).num_bytes == 0


def test_resizing_adds_zeros_or_lets_the_end_go():
    x = states(1, 5)
    assert resized(x, 5) is x
    longer = resized(x, 7)
    assert torch.equal(longer[:, :, :5], x)
    assert not longer[:, :, 5:].any()
    shorter = resized(x, 2)
    assert torch.equal(shorter, x[:, :, :2])
    assert shorter.data_ptr() != x.data_ptr(), "else the long one would stay in memory"
