"""Drafts as a side of the bench: the text of plain decoding, and what drafting came to."""

from __future__ import annotations

import pytest
import torch

from rheostat import QuantSpec
from rheostat.adapted import Adapted
from rheostat.bench.drafted import DraftedSide
from rheostat.bench.native import NativeSide
from rheostat.bench.sides import SideSpec, make_side, once
from rheostat.errors import SettingError
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

IDS, NEW = tiny_windows(2, 12), 12


def spec(draft: str, **more) -> SideSpec:
    return SideSpec(kind="native", model="m", weights="fp32", context=NEW, draft=draft, **more)


def adapted_for(draft: str) -> Adapted:
    return (
        tiny_adapted() if draft == "low_dial" else Adapted(tiny_model(), QuantSpec(group_size=8, weight_group_size=8))
    )


@pytest.mark.parametrize("draft", ["self", "low_dial", "prompt_lookup"])
def test_rounds_are_asked_for_token_by_token(draft):
    adapted = adapted_for(draft)
    side = make_side(spec(draft, draft_length=3), adapted)
    assert isinstance(side, DraftedSide)
    assert side.spec.label == f"native fp32 {draft} 1"
    plain = NativeSide(SideSpec(kind="native", model="m", weights="fp32", context=NEW), adapted, side.runtime)
    wanted = []
    with plain.session():
        state = plain.prefill(IDS)
        for _ in range(NEW - 1):
            wanted.append(state[1])
            state = plain.decode(state)
        wanted.append(state[1])
    with side.session():
        drafting = side.prefill(IDS)
        for number in range(2, NEW + 1):
            side.decode(drafting)
            assert min(map(len, drafting.written)) >= number
    assert drafting.has_ended
    assert drafting.written == torch.stack(wanted, 1).tolist()
    assert set(once(side, IDS, 4)) == {"first_token", "token"}
    assert plain.spent(IDS, NEW - 1).drafts is None


def test_drafts_and_their_bytes_are_in_the_bill():
    adapted = adapted_for("self")
    side = make_side(spec("self", draft_length=3), adapted)
    bill = side.spent(IDS, NEW - 1)
    drafts = bill.drafts
    assert drafts["drafted"] > 0
    assert len(drafts["acceptance_by_place"]) == 3
    assert 1 <= drafts["tokens_per_round"] <= 4
    assert bill.decode.bytes.draft > 0
    assert bill.decode.flops.draft > 0


@pytest.mark.parametrize(
    ("draft", "allowed"), [("snapkv", "self, low_dial or prompt_lookup"), ("nobody", "one of self")]
)
def test_drafters_that_it_cannot_time(draft, allowed):
    with pytest.raises(SettingError, match=allowed):
        make_side(spec(draft), adapted_for("self"))
