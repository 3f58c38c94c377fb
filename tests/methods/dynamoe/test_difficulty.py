"""What makes a token difficult, and to which changes each criterion is blind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rheostat.methods.dynamoe.difficulty import CRITERIA, NEEDS_GRADIENT, bound, fisher_root, labels, slice_damages
from rheostat.methods.dynamoe.method import nested_ffns
from tests.tiny import tiny_adapted

N, D = 50, 8
FULL, SMALL, GRADIENT = torch.randn(3, N, D, generator=torch.Generator().manual_seed(0)).unbind()
RESIDUAL = torch.full((N, 1), 5.0)

every = pytest.mark.parametrize("name", list(CRITERIA))


def damage(
    name: str, small: torch.Tensor, full: torch.Tensor = FULL, residual: torch.Tensor = RESIDUAL
) -> torch.Tensor:
    return CRITERIA[name](small, full, residual, GRADIENT)


@every
def test_the_whole_does_no_damage(name):
    torch.testing.assert_close(damage(name, FULL), torch.zeros(N), rtol=0, atol=1e-6)
    assert damage(name, SMALL).shape == (N,)
    assert bool((damage(name, SMALL) >= 0).all())
    assert bool((damage(name, SMALL) > 1e-6).any())


@every
def test_a_full_output_of_zero_is_no_division_by_zero(name):
    assert bool(torch.isfinite(damage(name, torch.zeros(N, D), torch.zeros(N, D))).all())


def test_cosine_is_blind_to_scale_and_the_others_are_not():
    torch.testing.assert_close(damage("cosine", 3 * SMALL), damage("cosine", SMALL))
    torch.testing.assert_close(damage("cosine", 0.5 * FULL), torch.zeros(N), rtol=0, atol=1e-6)
    torch.testing.assert_close(damage("projection", 0.5 * FULL), torch.full((N,), 0.5))
    torch.testing.assert_close(damage("error", 0.5 * FULL), torch.full((N,), 0.5))
    torch.testing.assert_close(damage("residual", 0.5 * FULL), 0.25 * FULL.square().sum(1) / 25)


def test_projection_is_blind_to_what_is_orthogonal():
    orthogonal = SMALL - (SMALL * FULL).sum(1, keepdim=True) / FULL.square().sum(1, keepdim=True) * FULL
    torch.testing.assert_close(damage("projection", FULL + orthogonal), torch.zeros(N), rtol=0, atol=1e-5)
    assert bool((damage("error", FULL + orthogonal) > 0.1).all())


@pytest.mark.parametrize("name", ["cosine", "error", "projection"])
def test_similarities_do_not_see_the_residual_nor_a_common_scale(name):
    torch.testing.assert_close(damage(name, SMALL, residual=9 * RESIDUAL), damage(name, SMALL))
    torch.testing.assert_close(damage(name, 7 * SMALL, 7 * FULL), damage(name, SMALL), rtol=1e-4, atol=1e-5)


def test_residual_is_relative_to_the_stream():
    torch.testing.assert_close(damage("residual", SMALL, residual=2 * RESIDUAL), damage("residual", SMALL) / 4)
    torch.testing.assert_close(damage("residual", SMALL + 3, FULL + 3), damage("residual", SMALL))


def test_fisher_sees_only_the_direction_of_the_gradient():
    along = GRADIENT / GRADIENT.norm(dim=1, keepdim=True)
    error = SMALL - (SMALL * along).sum(1, keepdim=True) * along
    torch.testing.assert_close(damage("fisher", FULL + error), torch.zeros(N), rtol=0, atol=1e-5)
    by_hand = 0.5 * torch.stack([(g @ (s - f)) ** 2 for g, s, f in zip(GRADIENT, SMALL, FULL, strict=True)])
    torch.testing.assert_close(damage("fisher", SMALL), by_hand)
    assert set(CRITERIA) >= NEEDS_GRADIENT


def test_the_root_gives_the_mean_over_draws():
    root = fisher_root(GRADIENT)
    error = torch.randn(D, generator=torch.Generator().manual_seed(1))
    drawn = 0.5 * (GRADIENT @ error).square().mean()
    given_ = 0.5 * (error @ root).square().sum()
    floor = 0.01 * GRADIENT.square().mean()
    assert float(given_) == pytest.approx(float(drawn + 0.5 * floor * error.square().sum()), rel=1e-4)


@given(st.floats(0, 2), st.floats(0, 2))
def test_a_higher_tolerance_never_raises_a_label(one, other):
    values = SMALL[:, :3].abs()
    low, high = labels(values, min(one, other)), labels(values, max(one, other))
    assert bool((high <= low).all())
    assert int(low.min()) >= 0
    assert int(low.max()) <= 3


def test_labels_are_the_smallest_that_suffice():
    values = torch.tensor([[0.3, 0.2, 0.1], [0.05, 0.2, 0.3], [0.3, 0.1, 0.2], [0.3, 0.3, 0.3]])
    assert labels(values, 0.1).tolist() == [2, 0, 1, 3]
    assert labels(values, 0.0).tolist() == [3] * 4
    assert labels(values, 1.0).tolist() == [0] * 4


@every
def test_slices_are_compared_with_the_whole_by_layer(name):
    ffn = nested_ffns(tiny_adapted("gemma3_text", router_steps=0).model)[1]
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    hidden, residual = ffn.mlp.hidden(x), torch.full((9,), 3.0)
    gradient = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))

    def contribute(y: torch.Tensor) -> torch.Tensor:
        return 2 * y

    given_ = slice_damages(ffn, hidden, bound(name, contribute, residual, gradient))
    assert given_.shape == (9, 3)
    scale = 2 if name == "residual" else 1  # only that one is judged where it joins the stream
    for expert in range(3):
        small = ffn.run(x, torch.full((9,), expert)).detach()
        wanted = CRITERIA[name](scale * small, scale * ffn.host(x).detach(), residual[:, None], gradient)
        torch.testing.assert_close(given_[:, expert], wanted, rtol=1e-3, atol=1e-4)
