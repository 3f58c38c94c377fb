"""What is proven for every method, on tiny models of several families. A new method is a line in `CASES`."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.cost import Cost, Parts
from rheostat.errors import SettingError
from rheostat.methods import METHODS, Chain, Method, make_method
from rheostat.methods.dynamoe import DynaMoE
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.methods.quantspec import QuantSpec
from rheostat.spending import spend
from tests.tiny import CONTRACT_FAMILIES, tiny_fitted, tiny_model, tiny_solved, tiny_windows

CASES: dict[str, Method] = {
    "dense": Method(),
    "dynamoe": DynaMoE(tile=4, router_width=8, router_steps=30, router_loss_share=1.0),
    "dynamoe-class": DynaMoE(
        tile=4,
        router_width=8,
        router_steps=30,
        router_loss_share=1.0,
        criterion="projection",
        target="class",
        refit=False,
        ranking="activation_weight",
    ),
    "quantspec": QuantSpec(group_size=16, weight_group_size=8),
    "chain-quantspec": Chain(
        [
            DynaMoE(tile=4, router_width=8, router_steps=30, router_loss_share=1.0),
            QuantSpec(group_size=16, weight_group_size=8),
        ]
    ),
    "chain": Chain([DynaMoE(tile=4, router_width=8, router_steps=30, router_loss_share=1.0, criterion="residual")]),
    "kv_prediction": KVPrediction(depths=(1,)),
    "kv_prediction-pruned": KVPrediction(auxiliary="pruned", kept=(0,)),
    "chain-prefill": Chain(
        [KVPrediction(depths=(1,)), DynaMoE(tile=4, router_width=8, router_steps=30, router_loss_share=1.0)]
    ),
}
"""Each method with settings fit for a tiny model."""

QUANTISED: dict[str, Method] = {
    "quantspec": QuantSpec(group_size=4, weight_group_size=8),
    "chain-kv_prediction-quantspec": Chain(
        [KVPrediction(auxiliary="pruned", kept=(0,)), QuantSpec(group_size=4, weight_group_size=8)]
    ),
}
"""Of these the caches have a quantised part after prompts as short as ours: nothing need equal the dense model."""

LEARNED = r"\.mlp\."
"""What DynaMoE trains: FFNs and routers. The chains train the same, for no cache has anything to learn."""

TRAINABLE: dict[str, str] = {
    "dense": "",
    "dynamoe": LEARNED,
    "dynamoe-class": LEARNED,
    "quantspec": "",
    "chain-quantspec": LEARNED,
    "chain": LEARNED,
    "kv_prediction": r"\.kv_predictors\.",
    "kv_prediction-pruned": r"\.kv_predictors\.",
    "chain-prefill": rf"\.kv_predictors\.|{LEARNED}",
}
"""Of each case, a pattern that the names of the parameters to be trained match, and no others."""

every = [pytest.param(name, family, id=f"{name}-{family}") for name in CASES for family in CONTRACT_FAMILIES]


def fitted(name: str, family: str) -> Adapted:
    """A tiny model adapted in closed form, its dial measured."""
    return tiny_fitted(CASES[name], family)


def logits(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def read(adapted: Adapted, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The next token's logits after a prompt, as the method reads it."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return adapted.method.prefill(adapted.model, ids, mask, adapted.method.make_cache(adapted.model))


def test_every_method_has_a_case():
    assert set(METHODS) <= {case.name for case in CASES.values()}


@pytest.mark.parametrize(("name", "family"), every)
def test_attach_then_detach_leaves_no_trace(name, family):
    model = tiny_model(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(key, id(module)) for key, module in model.named_modules()]
    adapted = Adapted(model, CASES[name])
    adapted.method.fit(model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    adapted.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [(key, id(module)) for key, module in model.named_modules()] == modules
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == [m for m in tiny_model(family).modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize(("name", "family"), every)
def test_attached_but_unfitted_is_the_dense_model_bit_for_bit(name, family):
    ids = tiny_windows(3)
    dense = logits(tiny_model(family), ids)
    adapted = Adapted(tiny_model(family), CASES[name])
    assert torch.equal(logits(adapted, ids), dense)
    with spend(1.0):
        assert torch.equal(logits(adapted, ids), dense)


@pytest.mark.parametrize(("name", "family"), every)
def test_full_compute_is_the_dense_model(name, family):
    ids = tiny_windows(3)
    original = tiny_model(family)
    adapted = fitted(name, family)
    with spend(1.0):
        mine = logits(adapted, ids)
    torch.testing.assert_close(mine, logits(original, ids), rtol=1e-4, atol=1e-4)
    prompt = ids[:, :8]
    mask = torch.ones_like(prompt)
    wanted = original.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    given = adapted.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, compute=1.0)
    assert torch.equal(given, wanted)


@pytest.mark.parametrize(("name", "family"), every)
def test_state_and_settings_survive_a_round_trip(name, family):
    ids = tiny_windows(2)
    adapted = tiny_solved(CASES[name], family)  # not put together, as `fitted` does it
    again = Adapted(tiny_model(family), make_method(adapted.method.to_dict()), adapted.dial)
    assert again.method == adapted.method
    again.method.load_state(again.model, adapted.method.state(adapted.model))
    again.model.load_state_dict(adapted.model.state_dict())
    for compute in (1.0, adapted.dial.low):
        with spend(compute):
            assert torch.equal(logits(again, ids), logits(adapted, ids))
            assert torch.equal(read(again, ids), read(adapted, ids))


@pytest.mark.parametrize(("name", "family"), every)
def test_left_padded_batch_equals_single_rows(name, family):
    adapted = fitted(name, family)
    rows = tiny_windows(3, 20)
    lengths = (20, 13, 6)
    mask = torch.tensor([[0] * (20 - n) + [1] * n for n in lengths])
    batch = rows * mask
    middle = (1 + adapted.dial.low) / 2
    with spend(middle), torch.no_grad():
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        together = adapted(input_ids=batch, attention_mask=mask, position_ids=position_ids).logits
        for row, n in enumerate(lengths):
            alone = adapted(input_ids=rows[row : row + 1, 20 - n :]).logits
            torch.testing.assert_close(together[row, 20 - n :], alone[0], rtol=1e-3, atol=1e-3)
        prompts = read(adapted, batch, mask)
        for row, n in enumerate(lengths):
            torch.testing.assert_close(
                prompts[row], read(adapted, rows[row : row + 1, 20 - n :])[0], rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
@pytest.mark.parametrize("name", list(CASES | QUANTISED))
def test_steps_after_left_padded_prompts_equal_those_of_single_rows(name, family):
    method = (CASES | QUANTISED)[name]
    adapted = Adapted(tiny_model(family).double(), method)
    rows, lengths = tiny_windows(3, 22), (20, 13, 6)
    mask = torch.tensor([[0] * (20 - n) + [1] * (n + 2) for n in lengths])
    native = {one.name: 2.0 for one in method.dialled() if one.at("prefill").reads_prompts}

    def steps(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        model, cache, start = adapted.model, adapted.method.make_cache(adapted.model), ids.shape[1] - 2
        with spend(native=native), torch.no_grad():
            adapted.method.prefill(model, ids[:, :start], mask[:, :start], cache)
            ends = (start + 1, start + 2)
            return torch.stack([adapted.method.decode(model, ids[:, t - 1 : t], mask[:, :t], cache) for t in ends], 1)

    together = steps(rows * mask, mask)
    for row, n in enumerate(lengths):
        one = rows[row : row + 1, 20 - n :]
        torch.testing.assert_close(together[row], steps(one, torch.ones_like(one))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "family"), every)
def test_prefill_then_decode_equals_one_forward(name, family):
    adapted = fitted(name, family)
    ids = tiny_windows(2, 24)
    mask = torch.ones_like(ids)
    middle = (1 + adapted.dial.low) / 2
    if adapted.method.at("prefill").reads_prompts:  # what is read ahead is not what the model itself would have made
        middle = 1.0
    with spend(middle), torch.no_grad():
        whole = adapted(input_ids=ids).logits
        cache = adapted.method.make_cache(adapted.model)
        steps = [adapted.method.prefill(adapted.model, ids[:, :10], mask[:, :10], cache)]
        for t in range(10, 24):
            steps.append(adapted.method.decode(adapted.model, ids[:, t : t + 1], mask[:, : t + 1], cache))
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 9:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "family"), every)
def test_decode_after_a_cheap_prompt_equals_one_chunk_after_it(name, family):
    adapted = fitted(name, family)
    ids = tiny_windows(2, 24)
    mask = torch.ones_like(ids)
    steps, chunks = [], []
    for is_chunk in (False, True):
        cache = adapted.method.make_cache(adapted.model)
        with spend({"prefill": adapted.dial.low}), torch.no_grad():
            adapted.method.prefill(adapted.model, ids[:, :10], mask[:, :10], cache)
        with spend(1.0), torch.no_grad():
            if is_chunk:
                chunks = adapted(input_ids=ids[:, 10:], attention_mask=mask, past_key_values=cache).logits
            else:
                for t in range(10, 24):
                    steps.append(adapted.method.decode(adapted.model, ids[:, t : t + 1], mask[:, : t + 1], cache))
    torch.testing.assert_close(torch.stack(steps, 1), chunks, rtol=1e-3, atol=1e-3)


def _kind(name: str) -> str:
    """The part of a parameter's name that says what it is, without layer and slice numbers."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


@pytest.mark.parametrize(("name", "family"), every)
def test_gradients_reach_exactly_the_declared_parameters(name, family):
    adapted = fitted(name, family)
    model, method = adapted.model, adapted.method
    declared = set(method.trainable(model))
    assert declared == {key for key, _ in model.named_parameters() if re.search(TRAINABLE[name], key)}
    model.requires_grad_(True)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in declared)
    # Half way on a joint path one of several methods may still be at its neutral setting.
    with spend((1 + adapted.dial.low) / 2 if len(method.dialled()) < 2 else adapted.dial.low):
        loss, parts = method.loss(model, {"input_ids": tiny_windows(6)})
    loss.backward()
    assert parts
    assert all(torch.isfinite(torch.tensor(value)) for value in parts.values())
    reached = {key for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached <= declared
    # Every kind of weight, the routers' and the slices' own included, must be among what moved.
    assert {_kind(key) for key in declared} == {_kind(key) for key in reached}


@pytest.mark.parametrize(("name", "family"), every)
def test_compute_spent_falls_with_compute_asked_and_is_close_to_it(name, family):
    adapted = fitted(name, family)
    windows = tiny_windows(seed=1)
    asked = [1.0 - k * (1 - adapted.dial.low) / 6 for k in range(7)]
    spent = []
    for compute in asked:
        with spend(compute) as meter:
            if adapted.method.at("prefill").reads_prompts:
                read(adapted, windows)
            else:
                logits(adapted, windows)
        spent.append(meter.compute)
    assert spent[0] == 1.0
    # A chain's path is ordered by what its calibration text spent; where two points lie close, another text may differ.
    slack = 0.01 if len(adapted.method.dialled()) > 1 else 1e-9
    assert all(b <= a + slack for a, b in pairwise(spent))
    if len(adapted.method.dialled()) > 1:  # measured on prompts and answers in a mix
        assert spent[-1] < 0.9
    elif adapted.method.steps(adapted.geometry) is not None:
        assert all(b <= a + 1e-6 for a, b in zip(asked, spent, strict=True))
        assert spent[-1] == pytest.approx(asked[-1], abs=1e-6)
    else:
        assert all(abs(a - b) < 0.05 for a, b in zip(asked, spent, strict=True))


@pytest.mark.parametrize(("name", "family"), every)
def test_predicted_cost_never_rises_when_compute_falls(name, family):
    adapted = Adapted(tiny_model(family), CASES[name])
    low = adapted.method.floor(adapted.geometry)
    if len(adapted.method.dialled()) > 1:
        with pytest.raises(SettingError, match="by measurement only"):
            adapted.method.cost(adapted.geometry, compute=(1 + low) / 2, num_tokens=1)
        return
    totals = [adapted.method.cost(adapted.geometry, compute=low + (1 - low) * k / 10, num_tokens=1) for k in range(11)]
    for less, more in pairwise(totals):
        assert less.flops.total <= more.flops.total
        assert less.bytes.total <= more.bytes.total
    if low < 1:
        with pytest.raises(SettingError, match="compute"):
            adapted.method.cost(adapted.geometry, compute=low - 0.01, num_tokens=1)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the multiply-adds of every matrix product with a weight that runs, from the operands' shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.squares: list[int] = []
        """Of products without a weight: attention over the context, and rotary tables."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        if name == "aten::mm":
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        elif name == "aten::addmm":
            self.flops += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif name == "aten::bmm":
            self.squares.append(2 * args[0].shape[0] * args[0].shape[1] * args[0].shape[2] * args[1].shape[2])
            self.flops += self.squares[-1]
        return out


@pytest.mark.parametrize(("name", "family"), every)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_meter_agrees_with_an_instrumented_count(name, family, share):
    adapted = fitted(name, family)
    adapted.model.set_attn_implementation("eager")
    ids = tiny_windows(2, 16)
    compute = 1 - (1 - adapted.dial.low) * (1 - share)
    with spend(compute) as meter, Counted() as counted, torch.no_grad():
        adapted(input_ids=ids, use_cache=False)
    geometry = adapted.geometry
    # Eager attention multiplies the whole T x T square and the meter bills the causal half; rotary tables are
    # one small bmm.
    square = geometry.num_layers * 4 * geometry.num_heads * geometry.head_dim * 2 * 16 * 16
    rotary = 2 * geometry.head_dim // 2 * 16
    expected = meter.cost.flops.flat + square
    assert counted.flops - expected in {k * rotary for k in range(5)}


@pytest.mark.parametrize(("name", "family"), every)
def test_meter_of_a_cheap_prompt_agrees_with_an_instrumented_count(name, family):
    adapted = fitted(name, family)
    adapted.model.set_attn_implementation("eager")
    with spend(adapted.dial.low) as meter, Counted() as counted:
        read(adapted, tiny_windows(2, 16))
    sides = [n for n in counted.squares if n]
    assert counted.flops - sum(sides) == meter.cost.flops.flat


@pytest.mark.parametrize(("name", "family"), every)
def test_dense_meter_equals_the_formula(name, family):
    adapted = Adapted(tiny_model(family), CASES[name])
    with spend(1.0) as meter:
        logits(adapted, tiny_windows(1, 24))
    formula = Method().cost(adapted.geometry, num_tokens=24, num_logits=24, itemsize=4)
    assert meter.cost == formula == meter.dense
    assert meter.tokens == 24


@pytest.mark.parametrize("name", list(CASES))
def test_bad_setting_names_itself(name):
    method = CASES[name]
    if isinstance(method, Chain):
        with pytest.raises(SettingError, match="both act at the stage"):
            Chain([method.methods[0], method.methods[0]])
        return
    with pytest.raises(SettingError, match=r"nonsense=1: must be one of"):
        type(method).from_dict({"nonsense": 1})
    for field in dataclasses.fields(method):
        if isinstance(getattr(method, field.name), int | float) and not isinstance(getattr(method, field.name), bool):
            with pytest.raises(SettingError, match=field.name):
                dataclasses.replace(method, **{field.name: -1})


def test_costs_add_by_part():
    one = Cost(flops=Parts(ffn=3, scores=1), bytes=Parts(head=2))
    assert (one + one).flops.ffn == 6
    assert (one + one).flops.flat == 6
    assert (one + one).bytes.total == 4
