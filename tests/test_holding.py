"""Held requests: they end at what they asked for, on every path the same, and no row or later token leaks."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rheostat import holding
from rheostat.adapted import Adapted
from rheostat.decode import stream
from rheostat.dial import Dial
from rheostat.errors import SettingError
from rheostat.holding import Account, Parts, Past, Table
from rheostat.methods import Method
from rheostat.spending import current_pass, spend
from tests.tiny import SMOLLM2, tiny_adapted, tiny_model, tiny_windows

LENGTHS = (20, 13, 6)
MASK = torch.tensor([[0] * (20 - n) + [1] * n for n in LENGTHS])
PROMPTS = tiny_windows(3, 20) * MASK
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 30}
DIAL = Dial(compute=(1.0, 0.9, 0.7, 0.6), settings={"m": (0.0, 0.01, 0.1, 1.0)})


@pytest.fixture(scope="module")
def llama() -> Adapted:
    return tiny_adapted("llama")


@pytest.fixture(scope="module")
def qwen() -> Adapted:
    return tiny_adapted("qwen3")


def middle(adapted: Adapted) -> float:
    return (1 + adapted.dial.low) / 2


# -- the whole


@pytest.mark.parametrize("part", [256, 6])
def test_a_held_batch_ends_at_what_was_asked_on_every_path_with_one_text(
    llama, part: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(holding, "PART", part)
    asked = middle(llama)
    texts, spent = [], []
    for runtime in ("stock", "native"):
        with spend(asked, hold=True) as meter:
            texts.append(llama.generate(PROMPTS, attention_mask=MASK, runtime=runtime, **GREEDY)[:, 20:])
        spent.append(meter.compute)
        with spend(asked, hold=True) as meter:
            steps = stream(llama, PROMPTS, MASK, max_new_tokens=30, runtime=runtime)
            texts.append(torch.stack([step.token_ids for step in steps], 1))
        spent.append(meter.compute)
    assert all(torch.equal(one, texts[0]) for one in texts)
    assert spent == [pytest.approx(asked, abs=0.005)] * 4
    with spend(asked) as meter:
        free = llama.generate(PROMPTS, attention_mask=MASK, **GREEDY)[:, 20:]
    assert abs(meter.compute - asked) > 0.04  # such text spends more at the table's setting
    assert not torch.equal(free, texts[0])


@pytest.mark.parametrize("runtime", ["stock", "native"])
def test_rows_are_held_each_for_itself(llama, runtime):
    asked = [1.0, middle(llama), llama.dial.low + 0.1]
    whole = llama.generate(PROMPTS, attention_mask=MASK, runtime=runtime, compute=asked, hold=True, **GREEDY)
    for row, (length, compute) in enumerate(zip(LENGTHS, asked, strict=True)):
        with spend(compute, hold=True) as meter:
            alone = llama.generate(PROMPTS[row : row + 1, 20 - length :], runtime=runtime, **GREEDY)
        assert torch.equal(alone[0, length:], whole[row, 20:])
        assert meter.compute == pytest.approx(compute, abs=0.02)


def test_a_row_at_full_compute_is_dense_to_the_bit_beside_held_ones(qwen):
    with torch.no_grad():
        with spend([1.0, middle(qwen), 1.0], hold=True):
            held = qwen(input_ids=PROMPTS, attention_mask=MASK).logits
        with spend([1.0, middle(qwen), 1.0]):
            free = qwen(input_ids=PROMPTS, attention_mask=MASK).logits
        with spend(1.0, hold=True):
            dense = qwen(input_ids=PROMPTS[:1]).logits
        with spend(1.0):
            assert torch.equal(dense, qwen(input_ids=PROMPTS[:1]).logits)
    assert torch.equal(held[0], free[0])
    assert not torch.equal(held[1], free[1])


def test_the_account_is_what_the_meter_says(qwen):
    asked = middle(qwen)
    cache = qwen.method.make_cache(qwen.model)
    with spend(asked, hold=True) as meter, torch.no_grad():
        qwen.method.prefill(qwen.model, PROMPTS[:1], torch.ones(1, 20), cache)
        for t in range(4):
            qwen.method.decode(qwen.model, PROMPTS[1:2, 10 + t : 11 + t], torch.ones(1, 21 + t), cache)
    account = qwen._hooks._accounts[cache]
    beyond = asked - 2 * account.rows[0].balance / meter.dense.flops.flat
    assert meter.compute == pytest.approx(beyond, abs=1e-12)
    assert account.rows[0].tokens == 24


def test_a_scored_text_is_held_without_looking_ahead(qwen):
    windows = tiny_windows(2, 48, seed=3)
    changed = windows.clone()
    changed[:, 24:] = tiny_windows(2, 24, seed=4)
    logits = []
    for one in (windows, changed):
        with spend(middle(qwen), hold=True), torch.no_grad():
            logits.append(qwen(input_ids=one, use_cache=False).logits[:, :24])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_pieces_of_a_prompt_and_answers_go_on_with_its_account(llama):
    asked, ids = middle(llama), PROMPTS[:1]
    cache = llama.method.make_cache(llama.model)
    with spend(asked, hold=True) as meter, torch.no_grad():
        llama.method.prefill(llama.model, ids[:, :9], torch.ones(1, 9), cache)
        first = meter.compute
        llama.method.prefill(llama.model, ids[:, 9:], torch.ones(1, 20), cache)
    assert abs(meter.compute - asked) <= abs(first - asked) + 1e-9
    assert meter.compute == pytest.approx(asked, abs=0.02)


def test_a_prompt_of_several_parts_reads_each_without_those_after_it(llama, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holding, "PART", 8)
    windows = tiny_windows(3, 20, seed=5)
    changed = windows.clone()
    changed[:, 8:] = tiny_windows(3, 12, seed=9)
    seen = []
    for ids in (windows, changed):
        with spend(middle(llama), hold=True), torch.no_grad():
            llama(input_ids=ids, logits_to_keep=1)
            held = current_pass().held  # type: ignore[union-attr]
            seen.append(held.by_part(1))  # type: ignore[union-attr]
    assert seen[0].shape == (3, 3)
    assert (seen[0][:, 0] == seen[1][:, 0]).all()
    assert (seen[0][:, 1:] != seen[1][:, 1:]).any()


def test_rows_with_a_past_that_nobody_held_know_how_long_it_is(qwen):
    cache = qwen.method.make_cache(qwen.model)
    with torch.no_grad():
        qwen.method.prefill(qwen.model, PROMPTS, MASK, cache)
        with spend(middle(qwen), hold=True):
            qwen.method.decode(qwen.model, PROMPTS[:, :1], torch.cat([MASK, MASK[:, -1:]], 1), cache)
    assert [past.tokens for past in qwen._hooks._accounts[cache].rows] == [n + 1 for n in LENGTHS]


def test_a_copy_of_a_cache_goes_on_from_the_same_account_by_itself(qwen):
    cache = qwen.method.make_cache(qwen.model)
    mask = torch.ones(1, 20)
    with spend(middle(qwen), hold=True), torch.no_grad():
        qwen.method.prefill(qwen.model, PROMPTS[:1], mask, cache)
        copied = copy.deepcopy(cache)
        qwen.share_account(cache, copied)
        for one in (cache, copied):
            for t in range(3):
                qwen.method.decode(qwen.model, PROMPTS[:1, t : t + 1], torch.ones(1, 21 + t), one)
    first, second = (qwen._hooks._accounts[one].rows[0] for one in (cache, copied))
    assert first == second
    assert first is not second


@pytest.mark.parametrize("rows", [[2], [1, 0, 2], [1, 1, 0, 2]], ids=str)
def test_rows_that_are_dropped_moved_or_repeated_go_on_as_they_would_alone(qwen, rows):
    def answer(prompts, mask, chosen):
        cache = qwen.method.make_cache(qwen.model)
        with spend(middle(qwen), hold=True), torch.no_grad():
            qwen.method.prefill(qwen.model, prompts, mask, cache)
            qwen.choose_rows(cache, torch.tensor(chosen))
            mask = mask[chosen]
            for t in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                logits = qwen.method.decode(qwen.model, torch.full((len(chosen), 1), 7 + t), mask, cache)
        return logits, qwen._hooks._accounts[cache].rows

    logits, accounts = answer(PROMPTS, MASK, rows)
    for place, row in enumerate(rows):
        alone, (own,) = answer(PROMPTS[row : row + 1], MASK[row : row + 1], [0])
        torch.testing.assert_close(logits[place], alone[0], rtol=1e-4, atol=1e-4)
        assert accounts[place] == own


def test_beams_are_held(qwen):
    with spend(middle(qwen), hold=True) as meter:
        qwen.generate(PROMPTS, attention_mask=MASK, num_beams=3, **GREEDY)
    assert meter.compute == pytest.approx(middle(qwen), abs=0.02)


def test_phases_are_held_apart(llama):
    low = llama.dial.low
    with spend({"prefill": 1.0, "decode": low + 0.1}, hold=True) as meter:
        llama.generate(PROMPTS, attention_mask=MASK, **GREEDY)
    decode = [one for one in meter.passes if one.phase == "decode"]
    assert all(bool((one.ffn_channels[one.valid] == 128).all()) for one in meter.passes if one.phase == "prefill")
    with spend(low + 0.1, hold=True) as both:
        llama.generate(PROMPTS, attention_mask=MASK, **GREEDY)
    assert len(decode) == 29
    assert both.compute < meter.compute


def test_a_table_without_a_profile_holds_too():
    adapted = tiny_adapted("llama")
    adapted.dial = replace(adapted.dial, profile={})
    with spend(middle(adapted), hold=True) as meter:
        adapted.generate(PROMPTS, attention_mask=MASK, **GREEDY)
    assert meter.compute == pytest.approx(middle(adapted), abs=0.02)


def test_a_model_that_cannot_hold_runs_as_it_is():
    adapted = Adapted(tiny_model(), Method())
    assert not adapted.can_hold
    with spend(1.0, hold=True):
        assert adapted.account(2) is None


def test_holding_that_cannot_be_is_refused(llama):
    with pytest.raises(SettingError, match="hold=True: must be False where no compute is given"):
        llama.generate(PROMPTS, attention_mask=MASK, hold=True, **GREEDY)
    for given in ({"compute": 0.9, "hold": True}, {}):
        with (
            spend(0.9, hold=True),
            pytest.raises(SettingError, match="hold=True: must be False with drafts"),
        ):
            llama.generate(PROMPTS, attention_mask=MASK, speculate="prompt_lookup", **given, **GREEDY)


# -- the parts


def table() -> Table:
    return Table(DIAL, SMOLLM2, "m")


def test_the_table_finds_the_place_that_saves_what_is_wanted():
    one = table()
    total = SMOLLM2.token_flops / 2
    places = one.find(0, np.array([-1.0, 0.1, 0.2, 0.3, 0.9]) * total)
    assert places == pytest.approx([1e-3, 1, 1.5, 2, 3], abs=1e-3)
    assert [len(group) for group in one.groups] == [2] * 15
    halfway = one.find(0, np.array([0.2 * total]))
    assert one.setting(halfway)[0] == pytest.approx(DIAL.native(0.8)["m"], rel=1e-3)
    assert one.setting(np.array([0.5]))[0] == pytest.approx(DIAL.native(0.95)["m"], rel=1e-6)


def test_a_profile_says_which_layers_save():
    shares = tuple((1.0,) * 15 + (1 - k / 3,) * 15 for k in range(4))
    one = Table(replace(DIAL, profile={"m": shares}), SMOLLM2, "m")
    assert one.of_group[0, 3] < one.of_group[-1, 3] / 4
    assert one.of_group.sum(0) == pytest.approx((1 - np.array(DIAL.compute)) * SMOLLM2.token_flops / 2)


def test_a_step_makes_up_for_what_went_before_within_the_table():
    asked = [0.8, 0.8, 0.8, 1.0]
    weights = SMOLLM2.token_flops / 2
    account = Account(table(), [Past(balance=k * weights) for k in (0, -2, 2000, -2)])
    values = account.step(asked).values
    assert values[1] > values[0] > values[2] > 0
    assert values[3] == 0
    assert values[1] <= 1.0
    starved = Account(account.table, [Past(balance=-1e6 * weights)] * 3)
    assert starved.step(asked[:3]).values == pytest.approx([1.0] * 3)


def test_a_place_for_one_token_is_that_for_many():
    one = table()
    total = SMOLLM2.token_flops / 2
    for wanted in (-0.5, 0.0, 0.0005, 0.05, 0.1, 0.25, 0.3999, 0.4, 0.9):
        place = one.find(0, np.array([wanted * total]))
        assert one.place(wanted * total) == pytest.approx(place[0], rel=1e-12)
        assert one.value(place[0]) == pytest.approx(one.setting(place)[0], rel=1e-12)
        assert one.saving(place[0]) == pytest.approx(np.interp(place, one.points, one.tails[0])[0], rel=1e-12)


def test_a_row_that_is_not_held_has_the_tables_setting():
    free = Account(table(), [None, Past(), None])
    assert free.step([0.8, 0.8, 1.0]).values == [
        DIAL.native(0.8)["m"],
        pytest.approx(DIAL.native(0.8)["m"], rel=0.01),
        0,
    ]
    reading = free.prompt([0.8, 0.8, 1.0], Parts.of(np.ones((3, 5), dtype=bool), [0, 0, 0]))
    assert reading.setting(0).tolist()[::2] == [DIAL.native(0.8)["m"], 0]


def test_what_is_asked_may_change_and_counts_from_then_on():
    account, weights = Account.new(table(), 1), SMOLLM2.token_flops / 2
    for asked in (1.0, 0.9, 0.7):
        account.step([asked]).close([0.05 * weights])
    past = account.rows[0]
    assert past.balance == pytest.approx((0.05 - 0.1 + 0.05 - 0.3) * weights)  # dense rows save nothing
    assert past.tokens == 3


def test_a_prompt_in_pieces_of_whole_parts_is_steered_as_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holding, "PART", 4)
    draws = np.random.default_rng(0).integers(0, 3 * 10**6, (30, 11))
    whole, pieces = Account.new(table(), 1), Account.new(table(), 1)
    values = []
    for account, spans in ((whole, [(0, 11)]), (pieces, [(0, 4), (4, 8), (8, 11)])):
        found = np.zeros((30, 11))
        for start, stop in spans:
            parts = Parts.of(np.ones((1, stop - start), dtype=bool), [start])
            reading = account.prompt([0.8], parts, is_last=stop == 11)
            for layer in range(30):
                found[layer, start:stop] = reading.setting(layer)
                reading.took(layer, draws[None, layer, start:stop])
        values.append(found)
    assert (values[0] == values[1]).all()
    assert len(np.unique(values[0])) > 8
    assert whole.rows == pieces.rows


def test_a_row_that_saves_less_than_expected_is_asked_for_more():
    account = Account.new(table(), 1)
    asked = [0.8]
    saved = 0.2 * SMOLLM2.token_flops / 2
    account.step(asked).close([saved])
    usual = account.step(asked).values
    for _ in range(20):
        account.step(asked).close([saved / 2])
    account.rows[0].balance = 0
    assert account.step(asked).values > usual
