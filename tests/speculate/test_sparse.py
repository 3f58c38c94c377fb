"""Which columns the sparse drafters read."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.speculate.drafter import State
from rheostat.speculate.sparse import SnapKV, SparseDrafter, StreamingLLM, count_votes
from rheostat.speculate.stock import StockHost
from tests.tiny import tiny_model, tiny_windows

MASK = torch.tensor([[1] * 40, [0] * 20 + [1] * 20])


def state(family: str = "qwen3") -> State:
    """A prompt of 40 tokens beside one of 20, read, and one token more."""
    adapted, ids = Adapted(tiny_model(family)), tiny_windows(2, 40) * MASK
    cache = adapted.method.make_cache(adapted.model)
    with torch.no_grad():
        adapted.method.prefill(adapted.model, ids, MASK, cache)
    longer = torch.cat([ids, ids[:, -1:]], 1)
    mask = torch.nn.functional.pad(MASK, (0, 1), value=1)
    return State(
        adapted.model,
        adapted.method,
        StockHost(adapted.model, adapted.method, cache),
        longer,
        mask,
        torch.ones(2, dtype=torch.bool),
    )


def test_streaming_reads_the_first_and_the_newest_of_each_row():
    chosen = StreamingLLM(share=0.25, num_sinks=4).choose(state(), 0, 2, 10)
    assert chosen[0, 0].tolist() == [0, 1, 2, 3, *range(34, 40)]
    assert chosen[1, 1].tolist() == [20, 21, 22, 23, *range(34, 40)]


def test_snapkv_reads_what_was_voted_for_and_never_padding():
    one, drafter = state(), SnapKV(share=0.6)
    before = one.model.config._attn_implementation
    with torch.no_grad():
        drafter.begin(one)
    assert one.model.config._attn_implementation == before
    budget = drafter.budget(one)
    assert budget == 20  # the shorter row has no more
    chosen = drafter.choose(one, 0, 2, budget)
    assert chosen.shape == (2, 2, budget)
    assert (chosen[1] >= 20).all()
    assert all(len(set(head.tolist())) == budget for row in chosen for head in row)
    assert set(range(21, 40)) <= set(chosen[0, 0].tolist())  # the observed ones stay


def test_votes_by_hand():
    weights = torch.zeros(1, 4, 2, 10)
    weights[0, 0, :, 5] = 1.0  # two observers, one of the two heads of the first key head
    votes = count_votes(weights, 2, torch.ones(1, 8, dtype=torch.bool))
    assert votes[0, 0].tolist() == pytest.approx([0, 0, 0, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert not votes[0, 1].any()


@pytest.mark.parametrize("drafter", [StreamingLLM(), SnapKV()])
def test_windows_are_refused(drafter):
    with pytest.raises(SettingError, match="drafter='.*must be another one: this model has layers"):
        drafter.begin(state("gemma3_text"))
        drafter.propose(state("gemma3_text"), torch.tensor([2, 2]))


@pytest.mark.parametrize("share", [0, 1.1])
@pytest.mark.parametrize("kind", [StreamingLLM, SnapKV])
def test_bad_settings_name_themselves(kind: type[SparseDrafter], share):
    with pytest.raises(SettingError, match=f"share={share}"):
        kind(share)
