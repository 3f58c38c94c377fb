"""Bills: the same sums however work is cut into passes (`test_generating` compares them with those of the modules)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.adapted import Adapted
from rheostat.cost import Cost
from rheostat.runtime.billing import Biller, Tally
from rheostat.runtime.building import build
from rheostat.spending import spend
from tests.tiny import tiny_adapted, tiny_model

ADAPTED = {
    "routed": tiny_adapted(),
    "own downs": tiny_adapted(refit=True),
    "plain": Adapted(tiny_model()),
    "windows": Adapted(tiny_model("mistral")),
}
kinds = st.sampled_from(sorted(ADAPTED))


def biller(kind: str) -> Biller:
    adapted = ADAPTED[kind]
    return Biller(build(adapted.model, adapted.hook_ids), adapted.geometry, 4)


def bill_of(work) -> tuple[Cost, Cost, dict]:
    """What `work(meter, tally)` bills: spent, dense, and tokens of each expert."""
    with spend() as meter:
        work(meter, Tally())
    return meter.cost, meter.dense, {layer: counts.tolist() for layer, counts in meter.expert_counts.items()}


def draw(one: Biller, *shape: int, seed: int) -> torch.Tensor | None:
    """Experts [..., N] in which layers come second to last; None for a model without."""
    if not one.routed:
        return None
    return torch.randint(0, one.sizes.shape[1], shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(kinds, st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 99))
def test_many_steps_cost_what_each_costs(kind, pasts, num_steps, seed):
    one, start = biller(kind), torch.tensor(pasts)
    experts = draw(one, num_steps, 2, len(pasts), seed=seed)

    def at_once(meter, tally):
        one.steps(meter, tally, start, experts, num_steps)

    def one_by_one(meter, tally):
        for step in range(num_steps):
            one.steps(meter, tally, start + step, None if experts is None else experts[step : step + 1], 1)

    assert bill_of(at_once) == bill_of(one_by_one)


@settings(deadline=None, max_examples=20)
@given(kinds, st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(0, 99))
def test_checking_one_token_a_row_is_a_step(kind, pasts, seed):
    one = biller(kind)
    experts = draw(one, 2, len(pasts), seed=seed)
    whole = None if experts is None else experts[None]
    step = bill_of(lambda meter, tally: one.steps(meter, tally, torch.tensor(pasts), whole, 1))
    assert step == bill_of(lambda meter, tally: one.check(meter, tally, pasts, [1] * len(pasts), experts))


@settings(deadline=None, max_examples=20)
@given(kinds, st.integers(2, 40), st.data())
def test_a_prompt_in_pieces_costs_its_flops_and_more_bytes(kind, length, data):
    """But for the head, which each piece's last token passes."""
    one, cut = biller(kind), data.draw(st.integers(1, length - 1))

    def read(*pieces: tuple[int, int]):
        def work(meter, tally):
            for past, number in pieces:
                one.prefill(meter, tally, torch.ones(1, number, dtype=torch.bool), [number], None, [past])

        return bill_of(work)[0]

    whole, parts = read((0, length)), read((0, cut), (cut, length - cut))
    for name in ("attention", "ffn", "scores"):
        assert getattr(whole.flops, name) == getattr(parts.flops, name), name
    assert parts.flops.head == 2 * whole.flops.head
    assert parts.bytes.total > whole.bytes.total, "weights are read twice"


@pytest.mark.parametrize("kind", ["routed", "own downs"])
def test_everybody_at_full_width_costs_the_dense_model_and_the_router(kind):
    one = biller(kind)
    full = one.full[:, None].expand(-1, 3)
    spent, dense, counts = bill_of(lambda meter, tally: one.check(meter, tally, [5], [3], full))
    asked_nothing = bill_of(lambda meter, tally: one.check(meter, tally, [5], [3], None))
    assert (dense, counts) == asked_nothing[1:]
    assert spent.flops.router == 2 * 3 * sum(one.router_weights)
    assert spent.flops.total - spent.flops.router == dense.flops.total == asked_nothing[0].flops.total


def test_two_batches_in_one_block_share_the_meters_counts():
    """A second batch adds to what the first has counted, and the first may go on."""
    one, pasts = biller("routed"), torch.tensor([4])
    experts = one.full[None, :, None]
    first, second = Tally(), Tally()
    with spend() as meter:
        for tally in (first, second, first):
            one.steps(meter, tally, pasts, experts, 1)
    assert [int(counts.sum()) for counts in meter.expert_counts.values()] == [3] * len(one.routed)
