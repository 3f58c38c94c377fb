"""Rotary positions: a rotation, that depends on the distance alone, from a table that grows."""

from __future__ import annotations

import pytest
import torch

from rheostat.runtime.building import build
from rheostat.runtime.rope import FIRST, RopeTable, rotate
from tests.tiny import tiny_model

FREQUENCIES = torch.tensor([1.0, 0.1, 0.01])


def heads(seed: int) -> torch.Tensor:
    """[1, 1, 2, 8]: two channels are not rotated."""
    return torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(table: RopeTable, x: torch.Tensor, position: int) -> torch.Tensor:
    return rotate(x, *table.at(torch.tensor([[position]])))


def test_a_rotation_keeps_lengths_and_what_is_not_rotated():
    table, x = RopeTable(FREQUENCIES), heads(0)
    turned = at(table, x, 17)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert not torch.allclose(turned[..., :6], x[..., :6])
    assert torch.equal(at(table, x, 0), x)


def test_scores_depend_on_the_distance_alone():
    table, query, key = RopeTable(FREQUENCIES), heads(1), heads(2)
    scores = [(at(table, query, 9 + shift) * at(table, key, 4 + shift)).sum() for shift in (0, 1, 500)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-5, rtol=1e-5)


def test_a_table_that_grew_still_says_what_it_said():
    table = RopeTable(FREQUENCIES, scale=1.5)
    before = table.cos_sin
    assert before.shape == (2, FIRST, 3)
    after = table.reserve(FIRST + 1)
    assert after.shape[1] == 2 * FIRST
    assert torch.equal(after[:, :FIRST], before)
    assert table.reserve(5) is after
    torch.testing.assert_close(after.square().sum(0), torch.full((2 * FIRST, 3), 1.5**2))


@pytest.mark.parametrize("family", ["llama", "phi3", "smollm3"])
def test_angles_are_those_of_transformers(family):
    model = tiny_model(family)
    weights, positions = build(model), torch.arange(40)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, 40, 32), positions)
    mine = RopeTable(weights.inv_freq, weights.rope_scale).at(positions)
    for theirs, ours in zip((cos, sin), mine, strict=True):
        torch.testing.assert_close(theirs, torch.cat([ours, ours], -1))
