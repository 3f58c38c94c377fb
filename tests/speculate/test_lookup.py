"""Prompt lookup."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.speculate.drafter import State
from rheostat.speculate.lookup import PromptLookup, look_up
from rheostat.speculate.loop import Ending, speculate
from rheostat.speculate.stock import StockHost
from rheostat.spending import spend
from tests.tiny import tiny_model

YES = torch.ones(1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("text", "limit", "found"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 9, 1, 2, 3], 9, [9, 1, 2, 3]),
        ([5, 3, 7, 2, 3, 8, 2, 3], 1, [8]),  # the longest match first, then the latest
        ([5, 3, 7, 6, 3], 1, [7]),
        ([4, 4], 3, [4]),
        ([1, 2, 3, 4], 3, []),
        ([1, 1, 1], 0, []),
        ([1], 3, []),
    ],
)
def test_what_followed_before(text, limit, found):
    assert look_up(torch.tensor(text), 3, limit).tolist() == found


def test_nothing_is_proposed_for_new_tokens_and_drafting_is_free():
    adapted = Adapted(tiny_model("qwen3"))
    repeated, unique = torch.tensor([[5, 6, 7] * 6]), torch.arange(3, 21)[None]
    for ids, is_drafting in ((repeated, True), (unique, False)):
        state = State(
            adapted.model, adapted.method, StockHost(adapted.model, adapted.method), ids, torch.ones_like(ids), YES
        )
        draft = PromptLookup().propose(state, torch.tensor([4]))
        assert bool(draft.lengths[0]) == is_drafting
    with spend() as meter:
        ending = Ending(max_new_tokens=20)
        list(speculate(adapted.model, adapted.method, repeated, drafter=PromptLookup(), ending=ending))
    assert sum(meter.speculation.drafted) > 0
    assert meter.cost.flops.draft == meter.cost.bytes.draft == 0


def test_bad_settings_name_themselves():
    with pytest.raises(SettingError, match="longest=0: must be 1 or more"):
        PromptLookup(0)
