"""An adapted model in use: batches, beams, dials by row and by phase, caches, threads, the bill."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache

from rheostat.adapted import Adapted
from rheostat.cost import attended
from rheostat.errors import SettingError
from rheostat.methods import DynaMoE, Method, QuantSpec
from rheostat.spending import current_spending, spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

LENGTHS = (20, 13, 6)
MASK = torch.tensor([[0] * (20 - n) + [1] * n for n in LENGTHS])
PROMPTS = tiny_windows(3, 20) * MASK
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def qwen() -> Adapted:
    return tiny_adapted("qwen3")


@pytest.fixture(scope="module")
def gemma() -> Adapted:
    return tiny_adapted("gemma3_text")


def alone(adapted: Adapted, row: int, compute: object, **settings: object) -> torch.Tensor:
    """New tokens of one row without padding and without neighbours."""
    ids = PROMPTS[row : row + 1, 20 - LENGTHS[row] :]
    mask = torch.ones_like(ids)
    out = adapted.generate(input_ids=ids, attention_mask=mask, compute=compute, **GREEDY | settings)
    return out[:, LENGTHS[row] :]


def together(adapted: Adapted, compute: object, **settings: object) -> torch.Tensor:
    out = adapted.generate(input_ids=PROMPTS, attention_mask=MASK, compute=compute, **GREEDY | settings)
    return out[:, 20:]


def at(adapted: Adapted, share: float) -> float:
    """The compute this far up from the lowest."""
    return adapted.dial.low + (1 - adapted.dial.low) * share


# -- batches, beams, samples


@pytest.mark.parametrize("implementation", [None, "static"])
def test_rows_with_different_dials_equal_rows_run_alone(gemma, implementation):
    asked = [1.0, gemma.dial.low, at(gemma, 0.5)]
    settings = {"cache_implementation": implementation, "disable_compile": True}
    batch = together(gemma, asked, **settings)
    assert len(batch.unique()) > 4
    for row, compute in enumerate(asked):
        assert torch.equal(batch[row : row + 1], alone(gemma, row, compute))
    assert not torch.equal(batch, together(gemma, [1.0, 1.0, 1.0]))


def test_a_tensor_of_dials_will_do(gemma):
    asked = [1.0, at(gemma, 0.1), at(gemma, 0.5)]
    assert torch.equal(together(gemma, torch.tensor(asked)), together(gemma, asked))


@pytest.mark.parametrize("implementation", [None, "static"])
def test_the_meter_counts_what_rows_cost_alone(qwen, implementation):
    compute = at(qwen, 0.4)
    with spend(compute) as meter:
        together(qwen, None, cache_implementation=implementation, disable_compile=True)
    assert (meter.num_prefill_tokens, meter.num_decode_tokens) == (39, 3 * 7)
    singles = []
    for row in range(3):
        with spend(compute) as one:
            alone(qwen, row, None)
        assert meter.token_fractions(row) == pytest.approx(one.token_fractions())
        singles.append(one)
    for name in ("attention", "scores", "ffn", "router", "head"):
        assert getattr(meter.cost.flops, name) == sum(getattr(one.cost.flops, name) for one in singles)
        assert getattr(meter.dense.flops, name) == sum(getattr(one.dense.flops, name) for one in singles)
    assert meter.cost.bytes.ffn < sum(one.cost.bytes.ffn for one in singles)  # weights are read once for all rows


def test_dense_generate_costs_what_the_formula_says(qwen):
    with spend(1.0) as meter:
        alone(qwen, 1, None)
    geometry = qwen.geometry
    num_tokens = 13 + 7
    flat = num_tokens * (geometry.token_flops - 2 * geometry.head_weights) + 8 * 2 * geometry.head_weights
    assert meter.cost.flops.flat == meter.dense.flops.flat == flat
    pairs = geometry.num_layers * attended(num_tokens, 0)
    assert meter.cost.flops.scores == 4 * geometry.num_heads * geometry.head_dim * pairs


def test_beams_at_different_dials_equal_rows_alone(gemma):
    asked = [1.0, gemma.dial.low, at(gemma, 0.5)]
    batch = together(gemma, asked, num_beams=3)
    for row, compute in enumerate(asked):
        assert torch.equal(batch[row : row + 1], alone(gemma, row, compute, num_beams=3))


def test_several_beams_are_returned_for_each_row(gemma):
    asked = [1.0, gemma.dial.low, at(gemma, 0.5)]
    batch = together(gemma, asked, num_beams=3, num_return_sequences=2)
    assert batch.shape == (6, 8)
    best = together(gemma, asked, num_beams=3)
    assert torch.equal(batch[::2], best)


def test_sampling_follows_the_seed(qwen):
    settings = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2}
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(together(qwen, [at(qwen, 0.3), 1.0, 1.0], **settings))
    assert draws[0].shape == (6, 8)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dials_that_do_not_fit_the_rows_are_refused(qwen):
    with pytest.raises(
        SettingError, match=r"compute=\(1.0, 0.9\): must be one number, or one a row: the batch has 3 rows"
    ):
        together(qwen, [1.0, 0.9])


# -- phases and caches


def test_phases_have_their_own_dials(qwen):
    low = qwen.dial.low
    with spend({"prefill": low}) as meter:
        together(qwen, None)
    prefill, *steps = meter.passes
    assert prefill.phase == "prefill"
    assert {one.phase for one in steps} == {"decode"}
    full = qwen.geometry.num_layers * qwen.geometry.ffn_size
    assert int(prefill.ffn_channels[prefill.valid].min()) < full
    assert all(bool((one.ffn_channels == full).all()) for one in steps)
    with spend({"decode": low}) as meter:
        together(qwen, None)
    prefill, *steps = meter.passes
    assert bool((prefill.ffn_channels[prefill.valid] == full).all())
    assert all(bool((one.ffn_channels < full).all()) for one in steps)


def test_a_bad_dial_for_a_phase_states_the_range(qwen):
    with pytest.raises(
        SettingError, match=r"compute=0.1: must be between 0\.\d+ and 1, the range this model's dial reaches"
    ):
        together(qwen, {"decode": 0.1})


@pytest.mark.parametrize("fixture", ["qwen", "gemma"])
def test_a_conversation_goes_on_with_a_filled_cache(fixture, request):
    adapted = request.getfixturevalue(fixture)
    compute = at(adapted, 0.4)
    cache = DynamicCache(config=adapted.config)
    first = adapted.generate(input_ids=PROMPTS, attention_mask=MASK, past_key_values=cache, compute=compute, **GREEDY)
    more = tiny_windows(3, 5, seed=9)
    ids = torch.cat([first, more], 1)
    mask = torch.cat([MASK, torch.ones(3, 8 + 5, dtype=torch.long)], 1)
    with spend(compute) as meter:
        second = adapted.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    # The newest token of the first answer had not been read yet.
    assert meter.num_prefill_tokens == 3 * 6
    assert meter.passes[0].phase == "prefill"
    fresh = adapted.generate(input_ids=ids, attention_mask=mask, compute=compute, **GREEDY)
    assert torch.equal(second, fresh)
    full = adapted.geometry.num_layers * adapted.geometry.ffn_size
    first_column = meter.passes[0].ffn_channels[:, 0]
    assert not bool((first_column == full).all())  # not a first token: nothing is pinned


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_four_dimensions_are_read(family, attention):
    """A cache of a fixed size makes `transformers` hand over its own masks, booleans or numbers."""
    adapted = tiny_adapted(family)
    adapted.model.set_attn_implementation(attention)
    compute = at(adapted, 0.4)
    with spend(compute) as dynamic:
        wanted = together(adapted, None)
    with spend(compute) as static:
        given = together(adapted, None, cache_implementation="static", disable_compile=True)
    assert torch.equal(given, wanted)
    assert static.cost == dynamic.cost
    assert [static.token_fractions(row) for row in range(3)] == [dynamic.token_fractions(row) for row in range(3)]


def test_an_empty_row_that_begins_later_has_its_first_token_pinned(qwen):
    full = qwen.geometry.num_layers * qwen.geometry.ffn_size
    cache = DynamicCache(config=qwen.config)
    ids = tiny_windows(2, 9)
    mask = torch.tensor([[1] * 9, [0] * 8 + [1]])
    with spend(qwen.dial.low) as meter, torch.no_grad():
        qwen(input_ids=ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        qwen(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache)
    assert int(meter.passes[0].ffn_channels[1].sum()) == 0
    assert meter.num_prefill_tokens == 8
    first, later = meter.passes[1].ffn_channels[1, 0], meter.passes[1].ffn_channels[0, 0]
    assert int(first) == full
    assert int(later) < full


def test_embeddings_may_be_given_in_place_of_tokens(qwen):
    ids = tiny_windows(2, 10)
    embeddings = qwen.model.get_input_embeddings()(ids)
    with spend(at(qwen, 0.4)) as meter, torch.no_grad():
        torch.testing.assert_close(qwen(inputs_embeds=embeddings).logits, qwen(input_ids=ids).logits)
        qwen.model.model(ids)
    assert meter.tokens == 60


# -- who sees the dial


def test_outside_a_block_the_model_is_dense(qwen):
    ids = tiny_windows(2, 12)
    with torch.no_grad():
        outside = qwen(input_ids=ids).logits
        with spend(1.0):
            assert torch.equal(qwen(input_ids=ids).logits, outside)
        with spend(qwen.dial.low):
            assert not torch.equal(qwen(input_ids=ids).logits, outside)
        assert torch.equal(qwen(input_ids=ids).logits, outside)


def test_generate_inside_a_block_counts_there_and_restores_the_dial(qwen):
    with spend(1.0) as meter:
        together(qwen, qwen.dial.low)
        assert meter.tokens == 39 + 21
        assert meter.compute < 1
        assert current_spending().prefill == (1.0,)


def test_threads_generate_at_their_own_dials(gemma):
    asked = {0: 1.0, 1: gemma.dial.low, 2: at(gemma, 0.5)}
    wanted = {row: alone(gemma, row, compute) for row, compute in asked.items()}
    given: dict[int, torch.Tensor] = {}

    def work(row: int) -> None:
        for _ in range(3):
            given[row] = alone(gemma, row, asked[row])

    with spend(at(gemma, 0.2)) as meter:  # a thread does not inherit this
        threads = [threading.Thread(target=work, args=(row,)) for row in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meter.tokens == 0
    assert all(torch.equal(given[row], wanted[row]) for row in asked)


def test_two_models_in_one_process_keep_their_own_dials(qwen):
    other = tiny_adapted("llama", seed=5)
    ids = tiny_windows(2, 12)
    with torch.no_grad():
        with spend(at(qwen, 0.3)):
            mine = qwen(input_ids=ids).logits
        with spend(at(other, 0.3)):
            theirs = other(input_ids=ids).logits
        with spend([at(qwen, 0.3), at(other, 0.3)]):
            assert torch.equal(qwen(input_ids=ids).logits[0], mine[0])
            torch.testing.assert_close(other(input_ids=ids).logits[1], theirs[1])


def test_a_model_without_a_dial_says_so():
    adapted = Adapted(tiny_model(), Method())
    with pytest.raises(SettingError, match="compute=0.5: must be 1.0: this model has no calibrated dial"), spend(0.5):
        adapted(input_ids=tiny_windows(1))


# -- the object itself


def test_detach_takes_every_hook_off():
    model = tiny_model()
    adapted = Adapted(model, DynaMoE(tile=4))
    assert any(module._forward_pre_hooks for module in model.modules())
    assert adapted.detach() is model
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with spend(1.0) as meter:
        model(input_ids=tiny_windows(1))
    assert meter.tokens == 0
    Adapted(model, DynaMoE(tile=4))  # and it can be adapted again


def test_a_refused_model_is_left_alone():
    model = tiny_model()
    with pytest.raises(SettingError, match=r"dynamoe.tile=64: must be below the FFN's width, 64"):
        Adapted(model, DynaMoE(tile=64))
    assert not any(module._forward_pre_hooks for module in model.modules())
    Adapted(model, DynaMoE(tile=4))
    with pytest.raises(SettingError, match="has DynaMoE attached already"):
        Adapted(model, DynaMoE(tile=4))


def test_it_passes_on_what_the_host_is(qwen):
    assert qwen.config is qwen.model.config
    assert qwen.generation_config is qwen.model.generation_config
    assert qwen.device == torch.device("cpu")
    assert qwen.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_bills_two_bytes_a_weight(dtype):
    adapted = tiny_adapted("qwen3")
    adapted.to(dtype)
    with spend(at(adapted, 0.4)) as meter:
        out = together(adapted, None)
    assert out.shape == (3, 8)
    with spend(1.0) as dense:
        together(adapted, None)
    assert 0.6 < meter.compute < 0.9
    geometry = adapted.geometry
    assert dense.cost.bytes.ffn == 8 * geometry.num_layers * geometry.ffn_weights * 2
    assert dense.cost.bytes.head == 8 * geometry.head_weights * 2


def test_a_model_is_adapted_once():
    first = Adapted(tiny_model())
    with pytest.raises(SettingError, match="model: is adapted already; detach it first"):
        Adapted(first.model)
    with spend(1.0) as meter:
        Adapted(first.detach())(input_ids=tiny_windows(1))
    assert meter.cost == meter.dense
    assert meter.tokens == 32


def test_an_empty_cache_of_the_callers_own_is_filled():
    adapted, cache = Adapted(tiny_model(), QuantSpec(group_size=4, weight_group_size=8)), DynamicCache()
    adapted.generate(tiny_windows(1, 8), past_key_values=cache, runtime="stock", **GREEDY)
    assert cache.get_seq_length() == 8 + 7
