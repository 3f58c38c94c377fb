"""The module in an FFN's place: what it computes, what it leaves alone, what it bills."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.methods.dynamoe import ffn as module
from rheostat.methods.dynamoe.method import nested_ffns
from rheostat.spending import Pass, enter_pass, spend
from tests.tiny import tiny_adapted, tiny_windows


@pytest.fixture(scope="module")
def adapted() -> Adapted:
    return tiny_adapted()


def no_pads(num_rows: int, num_tokens: int, setting: list[float], **changes: object) -> Pass:
    valid = torch.ones(num_rows, num_tokens, dtype=torch.bool)
    facts = {"valid": valid, "first": torch.zeros_like(valid), "settings": {"dynamoe": torch.tensor(setting)}}
    return Pass("prefill", **facts | changes)


def random_inputs(num_rows: int = 3, num_tokens: int = 7) -> torch.Tensor:
    return torch.randn(num_rows, num_tokens, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def chosen(ffn: module.NestedFFN, x: torch.Tensor, one: Pass) -> torch.Tensor:
    """Experts [B, T]."""
    with spend(1.0):
        choice = ffn.choose(x, one, module.current_spending())
    return choice.view(x.shape[:2])


def test_outside_a_block_or_at_the_neutral_setting_the_host_runs(adapted):
    ffn, x = nested_ffns(adapted.model)[0], random_inputs()
    with torch.no_grad():
        wanted = ffn.host(x)
        enter_pass(no_pads(3, 7, [1e9] * 3))
        assert torch.equal(ffn(x), wanted)
        with spend(1.0):
            enter_pass(no_pads(3, 7, [0.0] * 3))
            assert torch.equal(ffn(x), wanted)
            enter_pass(no_pads(3, 7, [], settings={}))
            assert torch.equal(ffn(x), wanted)


def test_neighbours_do_not_change_a_tokens_choice():
    ffn, x = nested_ffns(tiny_adapted(router_steps=0).model)[1], random_inputs(4, 9)
    with torch.no_grad():  # a router that tells tokens apart
        ffn.router.outer.weight.normal_(generator=torch.Generator().manual_seed(1))
        ffn.router.outer.bias.zero_()
    setting = 1.0
    together = chosen(ffn, x, no_pads(4, 9, [setting, 0.0, setting, 1e9]))
    assert bool((together[1] == 3).all())
    assert bool((together[3] == 0).all())
    assert len(together[[0, 2]].unique()) > 1
    for row in (0, 2):
        assert torch.equal(chosen(ffn, x[row : row + 1], no_pads(1, 9, [setting]))[0], together[row])
        for t in range(9):
            alone = chosen(ffn, x[row : row + 1, t : t + 1], no_pads(1, 1, [setting]))
            assert int(alone) == int(together[row, t])


def test_the_first_token_is_pinned_and_padding_is_skipped(adapted):
    ffn, x = nested_ffns(adapted.model)[0], random_inputs(2, 4)
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    first = torch.tensor([[False, False, True, False], [True, False, False, False]])
    one = no_pads(2, 4, [1e9, 1e9], valid=valid, first=first)
    assert chosen(ffn, x, one).tolist() == [[-1, -1, 3, 0], [3, 0, 0, 0]]


def test_padding_is_not_computed(adapted, monkeypatch):
    seen = []
    grouped = module.run_grouped

    def watch(x, choice, *args):
        seen.append(choice.clone())
        return grouped(x, choice, *args)

    monkeypatch.setattr(module, "run_grouped", watch)
    ids = tiny_windows(2, 8)
    mask = torch.tensor([[0] * 5 + [1] * 3, [1] * 8])
    with spend(adapted.dial.low), torch.no_grad():
        adapted(input_ids=ids, attention_mask=mask)
    assert len(seen) == 2
    for choice in seen:
        assert torch.equal(choice.view(2, 8) >= 0, mask.bool())
        assert choice.view(2, 8)[0, 5] == choice.view(2, 8)[1, 0] == 3
    ffn = nested_ffns(adapted.model)[0]
    out = grouped(torch.full((4, 32), 7.0), torch.tensor([-1, -1, 0, -1]), ffn.mlp, ffn.downs, ffn.sizes)
    assert torch.equal(out[[0, 1, 3]], torch.zeros(3, 32))


@pytest.mark.parametrize("refit", [True, False])
def test_the_bill_is_what_the_experts_multiply_and_read(refit):
    adapted = tiny_adapted(refit=refit, router_steps=0)
    ffn, x = nested_ffns(adapted.model)[0], random_inputs(1, 6)
    fixed = torch.tensor([0, 2, 2, 0, 2, -1])
    router = 32 * 8 + 8 * 3
    for override in (None, lambda layer, x: fixed):
        with spend(1.0, override=override) as meter:
            meter.open_pass("prefill", torch.ones(1, 6, dtype=torch.bool), 1, 64)
            enter_pass(no_pads(1, 6, [1e9]))
            with torch.no_grad():
                ffn(x)
        flops, read = meter.cost.flops, meter.cost.bytes
        if override is None:
            assert flops.ffn == 2 * 3 * 32 * 6 * 16
            assert flops.router == 2 * router * 6
            assert read.ffn == 3 * 32 * 16 * 4
            assert read.router == router * 4
            assert meter.expert_counts[0].tolist() == [6, 0, 0, 0]
            assert meter.dense.flops.ffn == 2 * 3 * 32 * 6 * 64
        else:
            assert flops.ffn == 2 * 3 * 32 * (2 * 16 + 3 * 48)
            assert flops.router == read.router == 0
            # Gate and up up to the widest; with down projections of their own, one for each expert in use.
            assert read.ffn == 32 * (2 * 48 + (16 + 48 if refit else 48)) * 4
            assert meter.token_fractions() == [0.25, 0.75, 0.75, 0.25, 0.75, 0.0]
            assert meter.dense.flops.ffn == 2 * 3 * 32 * 5 * 64
        assert meter.dense.bytes.ffn == 3 * 32 * 64 * 4


def test_a_dense_pass_bills_the_valid_tokens(adapted):
    ffn, x = nested_ffns(adapted.model)[0], random_inputs(1, 4)
    valid = torch.tensor([[False, True, True, True]])
    with spend(1.0) as meter, torch.no_grad():
        meter.open_pass("prefill", valid, 1, 64)
        enter_pass(no_pads(1, 4, [], valid=valid, settings={}))
        ffn(x)
    assert meter.cost == meter.dense
    assert meter.cost.flops.ffn == 2 * 3 * 32 * 64 * 3
    assert meter.token_fractions() == [1.0, 1.0, 1.0]


def test_a_plain_step_skips_the_masks(adapted):
    ffn, x = nested_ffns(adapted.model)[0], random_inputs(2, 1)
    one = no_pads(2, 1, [1e9, 0.0], is_plain=True, valid=torch.zeros(2, 1, dtype=torch.bool))
    assert chosen(ffn, x, one).tolist() == [[0], [3]]  # what the masks say is not asked


def test_every_way_to_run_is_one_function(adapted):
    ffn, x = nested_ffns(adapted.model)[0], random_inputs(1, 6)[0]
    choice = torch.tensor([0, 3, -1, 2, 1, 0])
    with torch.no_grad():
        grouped = ffn.run(x, choice)
        ffn.is_naive = True
        naive = ffn.run(x, choice)
        del ffn.is_naive
        assert not ffn.is_naive
        single = torch.cat([ffn.run(x[i : i + 1], choice[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(naive, grouped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single, grouped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["damage", "class"])
def test_decide_obeys_the_setting_of_each_token(target):
    ffn = nested_ffns(tiny_adapted(target=target).model)[0]
    x = random_inputs(1, 5)[0]
    top = 1.0 if target == "class" else 1e9
    assert ffn.decide(ffn.router(x), torch.tensor([0.0, top, 0.0, top, top])).tolist() == [3, 0, 3, 0, 0]


def test_down_projections_of_their_own():
    ffn = nested_ffns(tiny_adapted(refit=False, router_steps=0).model)[0]
    assert len(ffn.downs) == 0
    ffn.add_downs(has_bias=True)
    assert [tuple(down.weight.shape) for down in ffn.downs] == [(32, 16), (32, 32), (32, 48)]
    ffn.set_down(1, torch.ones(32, 32), torch.full((32,), 2.0))
    assert bool((ffn.downs[1].weight == 1).all())
    assert bool((ffn.downs[1].bias == 2).all())
