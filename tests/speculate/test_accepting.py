"""Which drafted tokens stay: by hand, and by a chi-square test that a wrong rule fails."""

from __future__ import annotations

import pytest
import torch

from rheostat.speculate import accepting
from rheostat.speculate.accepting import accept_greedy, accept_sampled, residual

V = 8
DRAWS = 200_000
CRITICAL = 103.4
"""Chi-square with 63 degrees of freedom exceeds this once in a thousand times."""


def laws(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """p of the first token and, for each first token, of the second; and q likewise: [V + 1, V] each."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(V + 1, V, generator=generator).mul(1.5).softmax(-1) for _ in range(2))
    return p, q


def draw_pairs(p: torch.Tensor, q: torch.Tensor, *, is_drawn: bool, seed: int = 1) -> torch.Tensor:
    """The first two tokens that speculation writes, two being drafted at a time: counts [V, V]."""
    generator = torch.Generator().manual_seed(seed)

    def drafted(given: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(given, 1, generator=generator)[:, 0] if is_drawn else given.argmax(-1)

    first = drafted(q[:1].expand(DRAWS, -1))
    second = drafted(q[1 + first])
    draft_ids = torch.stack([first, second], 1)
    target = torch.stack([p[:1].expand(DRAWS, -1), p[1 + first], p[1 + second]], 1)
    draft = torch.stack([q[:1].expand(DRAWS, -1), q[1 + first]], 1) if is_drawn else None
    lengths = torch.full((DRAWS,), 2)
    kept, following = accept_sampled(target, draft_ids, draft, lengths, generator)
    one = torch.where(kept > 0, first, following)
    later = torch.multinomial(p[1 + one], 1, generator=generator)[:, 0]  # where the round ended: a plain step
    two = torch.where(kept > 1, second, torch.where(kept == 1, following, later))
    return torch.bincount(one * V + two, minlength=V * V)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = (p[0][:, None] * p[1:]).flatten().double() * DRAWS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("is_drawn", [True, False])
def test_the_law_of_two_tokens_is_the_model_s(is_drawn):
    p, q = laws()
    assert chi_square(draw_pairs(p, q, is_drawn=is_drawn), p) < CRITICAL


@pytest.mark.parametrize("is_drawn", [True, False])
def test_drawing_from_p_after_a_rejection_fails(monkeypatch, is_drawn):
    p, q = laws()
    monkeypatch.setattr(accepting, "residual", lambda p, q: p)
    assert chi_square(draw_pairs(p, q, is_drawn=is_drawn), p) > 100 * CRITICAL


def test_a_greedy_draft_scored_with_its_probability_fails():
    p, q = laws()
    original = accept_sampled
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "accept_sampled", lambda t, ids, _, n, g: original(t, ids, q_of(ids, q), n, g))
        assert chi_square(draw_pairs(p, q, is_drawn=False), p) > 100 * CRITICAL


def q_of(draft_ids: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.stack([q[:1].expand(len(draft_ids), -1), q[1 + draft_ids[:, 0]]], 1)


def test_acceptance_is_the_overlap_of_the_laws():
    p, q = laws()
    generator = torch.Generator().manual_seed(3)
    ids = torch.multinomial(q[:1].expand(DRAWS, -1), 1, generator=generator)
    target, draft = p[:1].expand(DRAWS, 2, -1), q[:1].expand(DRAWS, 1, -1)
    kept, _ = accept_sampled(target, ids, draft, torch.ones(DRAWS, dtype=torch.long), generator)
    expected = float(torch.minimum(p[0], q[0]).sum())
    error = (expected * (1 - expected) / DRAWS) ** 0.5
    assert abs(float(kept.double().mean()) - expected) < 3 * error


def test_greedy_by_hand():
    target, draft = [[5, 6, 7]] * 4, [[5, 6], [5, 1], [1, 6], [5, 6]]
    kept, following = accept_greedy(target, draft, [2, 2, 2, 1])
    assert kept == [2, 1, 0, 1]
    assert following == [7, 6, 5, 6]


def test_an_empty_draft_is_a_plain_step():
    p = torch.zeros(2, 1, V)
    p[0, 0, 3] = p[1, 0, 4] = 1
    empty, none = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    kept, following = accept_sampled(p, empty, None, none)
    assert kept.tolist() == [0, 0]
    assert following.tolist() == [3, 4]
    assert accept_greedy(p.argmax(-1).tolist(), [[], []], [0, 0]) == ([0, 0], [3, 4])


def test_a_draft_shorter_than_the_others_ends_with_the_model_s_own_law():
    p = torch.zeros(1, 3, V)
    p[0, :, 2] = 1
    draft = torch.full((1, 2, V), 1 / V)
    kept, following = accept_sampled(p, torch.tensor([[2, 5]]), draft, torch.tensor([1]))
    assert kept.tolist() == [1]
    assert following.tolist() == [2]  # from p, not from what p leaves of q


def test_the_residual_of_equal_laws_is_the_law():
    p, _ = laws()
    assert torch.equal(residual(p, p.clone()), p)
    assert (residual(p, p.roll(1, 1)) * p.roll(1, 1) <= p * p.roll(1, 1)).all()
