"""The formula, the meter and a count of what really ran agree, part by part, in FLOPs and in bytes."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.cost import Cost, decode_cost, dense_cost
from rheostat.methods import Method
from rheostat.methods.base import positions
from rheostat.spending import spend
from tests.counting import Counted, counting, square_scores
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

FAMILIES = ("llama", "qwen3", "gemma3_text", "gemma2", "phi3")
FLAT = ("attention", "ffn", "router", "head")
LENGTHS = (21, 9, 14)
"""Of the left-padded rows: both sides of the Gemmas' window of 16."""


def eager(adapted: Adapted) -> Adapted:
    adapted.model.set_attn_implementation("eager")
    return adapted


def plain(family: str) -> Adapted:
    return eager(Adapted(tiny_model(family), Method()))


@pytest.fixture(scope="module", params=("llama", "qwen3", "gemma3_text"))
def dialled(request) -> Adapted:
    """Slices with views of the host's down projection, so that what is read is a prefix."""
    return eager(tiny_adapted(request.param, refit=False))


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[0] * (max(LENGTHS) - n) + [1] * n for n in LENGTHS])
    return tiny_windows(len(LENGTHS), max(LENGTHS)) * mask, mask


def agree(adapted: Adapted, cost: Cost, counted: Counted) -> None:
    """All parts that do not depend on the context, and the bytes of weights and rows."""
    for part in FLAT:
        assert getattr(cost.flops, part) == counted.flops[part], part
    weights = sum(getattr(cost.bytes, part) for part in FLAT)
    assert weights == counted.weight_bytes
    assert cost.bytes.embeddings == counted.row_bytes
    assert cost.flops.embeddings == 0


def cache_bytes(cache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


# -- plain models: formula, meter and count are the same


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_prefill_and_decode_of_a_plain_model(family, num_rows):
    adapted = plain(family)
    geometry = adapted.geometry
    ids = tiny_windows(num_rows, 24)
    cache = adapted.method.make_cache(adapted.model)
    mask = torch.ones_like(ids)
    with spend(1.0) as meter, counting(adapted) as counted:
        adapted.method.prefill(adapted.model, ids[:, :20], mask[:, :20], cache)
    formula = dense_cost(geometry, num_tokens=20, past=0, num_logits=1, itemsize=4, num_rows=num_rows)
    assert meter.cost == meter.dense == formula
    agree(adapted, formula, counted)
    assert counted.flops["scores"] == square_scores(geometry, num_rows, 20, 0)
    for past in range(20, 24):
        with spend(1.0) as meter, counting(adapted) as counted:
            adapted.method.decode(adapted.model, ids[:, past : past + 1], mask[:, : past + 1], cache)
        formula = decode_cost(geometry, num_steps=1, past=past, itemsize=4, num_rows=num_rows)
        assert meter.cost == meter.dense == formula
        agree(adapted, formula, counted)
        assert formula.flops.scores == counted.flops["scores"]  # one query: the square is what counts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_read_and_written_as_billed(family):
    """Keys and values are written once; one more token reads all that are kept for it, its own included."""
    adapted = plain(family)
    geometry = adapted.geometry
    ids = tiny_windows(2, 13)
    mask = torch.ones_like(ids)
    cache = adapted.method.make_cache(adapted.model)
    with torch.no_grad():
        adapted.method.prefill(adapted.model, ids[:, :12], mask[:, :12], cache)
    formula = dense_cost(geometry, num_tokens=12, past=0, num_logits=1, itemsize=4, num_rows=2)
    assert formula.bytes.scores == 2 * cache_bytes(cache)  # within every window: written, and read
    with torch.no_grad():
        adapted.method.decode(adapted.model, ids[:, 12:], mask, cache)
    step = decode_cost(geometry, num_steps=1, past=12, itemsize=4, num_rows=2)
    assert step.bytes.scores == cache_bytes(cache) + cache_bytes(cache) // 13


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_text_takes_the_head_at_every_position(family):
    adapted = plain(family)
    ids = tiny_windows(2, 10)
    with spend(1.0) as meter, counting(adapted) as counted:
        adapted(input_ids=ids, use_cache=False)
    formula = dense_cost(adapted.geometry, num_tokens=10, past=0, num_logits=10, itemsize=4, num_rows=2)
    assert meter.cost == formula
    agree(adapted, formula, counted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_half_the_bytes(dtype):
    adapted = plain("qwen3")
    adapted.to(dtype)
    with spend(1.0) as meter, counting(adapted) as counted:
        adapted(input_ids=tiny_windows(1, 10), use_cache=False)
    agree(adapted, meter.cost, counted)
    assert meter.cost == dense_cost(adapted.geometry, num_tokens=10, past=0, num_logits=10, itemsize=2)


def test_embeddings_that_were_given_are_not_looked_up():
    adapted = plain("llama")
    embeddings = adapted.model.get_input_embeddings()(tiny_windows(2, 10)).detach()
    with spend(1.0) as meter, counting(adapted) as counted:
        adapted(inputs_embeds=embeddings, use_cache=False)
    assert meter.cost.bytes.embeddings == counted.row_bytes == 0


# -- padding is run and not billed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_billed_like_its_rows_alone(family):
    adapted = plain(family)
    geometry = adapted.geometry
    ids, mask = prompts()
    cache = adapted.method.make_cache(adapted.model)
    with spend(1.0) as meter, counting(adapted) as counted:
        adapted.method.prefill(adapted.model, ids, mask, cache)
    alone = [dense_cost(geometry, num_tokens=n, past=0, num_logits=1, itemsize=4) for n in LENGTHS]
    total = sum(alone, Cost())
    assert meter.cost.flops == total.flops
    assert meter.cost.bytes.scores == total.bytes.scores
    assert meter.cost.bytes.embeddings == total.bytes.embeddings
    for part in FLAT:  # weights are read once for all rows
        assert getattr(meter.cost.bytes, part) == getattr(alone[0].bytes, part)
    # What ran besides: every projection and FFN on padding too.
    pads = len(LENGTHS) * max(LENGTHS) - sum(LENGTHS)
    assert (
        counted.flops["attention"] - total.flops.attention
        == 2 * geometry.num_layers * geometry.attention_weights * pads
    )
    assert counted.flops["ffn"] - total.flops.ffn == 2 * geometry.num_layers * geometry.ffn_weights * pads
    assert counted.flops["head"] == total.flops.head
    with spend(1.0) as meter, counting(adapted) as counted:
        adapted.method.decode(adapted.model, ids[:, -1:], torch.cat([mask, mask[:, -1:]], 1), cache)
    steps = sum((decode_cost(geometry, num_steps=1, past=n, itemsize=4) for n in LENGTHS), Cost())
    assert meter.cost.flops == steps.flops
    assert meter.cost.bytes.scores == steps.bytes.scores
    for part in ("attention", "ffn", "head"):
        assert getattr(steps.flops, part) == counted.flops[part]


@pytest.mark.parametrize(
    ("family", "attention"),
    [("qwen3", "eager"), ("qwen3", "sdpa"), ("gemma3_text", "eager"), ("gemma3_text", "sdpa"), ("gemma2", "eager")],
)
def test_a_cache_of_a_fixed_size_costs_the_same(family, attention):
    adapted = Adapted(tiny_model(family), Method())
    adapted.model.set_attn_implementation(attention)
    ids, mask = prompts()
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with spend(1.0) as dynamic:
        wanted = adapted.generate(**settings)
    with spend(1.0) as static:
        given = adapted.generate(**settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(given, wanted)
    assert static.cost == dynamic.cost
    alone = Cost()
    for n in LENGTHS:
        alone += dense_cost(adapted.geometry, num_tokens=n, past=0, num_logits=1, itemsize=4)
        alone += decode_cost(adapted.geometry, num_steps=7, past=n, itemsize=4)
    assert dynamic.cost.flops == alone.flops
    assert dynamic.cost.bytes.scores == alone.bytes.scores


def test_what_is_known_of_a_cache_is_dropped_when_it_was_cut():
    adapted = plain("qwen3")
    ids, mask = prompts()
    cache = adapted.method.make_cache(adapted.model)
    with spend(1.0), torch.no_grad():
        adapted(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-11)
        with spend(1.0) as meter:
            adapted(input_ids=ids[:, :1], past_key_values=cache)  # no mask: all ten count
    assert meter.cost == decode_cost(adapted.geometry, num_steps=1, past=10, itemsize=4, num_rows=3)


# -- under the dial


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3, 0.0])
def test_routed_passes_are_billed_for_what_ran(dialled, share):
    compute = dialled.dial.low + (1 - dialled.dial.low) * share
    ids = tiny_windows(2, 24)
    mask = torch.ones_like(ids)
    cache = dialled.method.make_cache(dialled.model)
    with spend(compute) as meter, counting(dialled) as counted:
        dialled.method.prefill(dialled.model, ids[:, :20], mask[:, :20], cache)
    agree(dialled, meter.cost, counted)
    formula = dense_cost(dialled.geometry, num_tokens=20, past=0, num_logits=1, itemsize=4, num_rows=2)
    assert meter.dense == formula
    assert (meter.cost == formula) == (share == 1.0)
    for past in range(20, 24):
        with spend(compute) as meter, counting(dialled) as counted:
            dialled.method.decode(dialled.model, ids[:, past : past + 1], mask[:, : past + 1], cache)
        agree(dialled, meter.cost, counted)
        assert meter.cost.flops.scores == counted.flops["scores"]
        assert meter.dense == decode_cost(dialled.geometry, num_steps=1, past=past, itemsize=4, num_rows=2)


def test_routed_padding_is_not_run_by_the_experts(dialled):
    ids, mask = prompts()
    with spend(dialled.dial.low) as meter, counting(dialled) as counted:
        dialled(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    assert meter.cost.flops.ffn == counted.flops["ffn"]
    pads = int((mask == 0).sum())
    router = meter.cost.bytes.router // 4  # weights, all layers
    assert counted.flops["router"] - meter.cost.flops.router == 2 * router * pads


def test_the_methods_formula_is_the_meters_at_both_ends(dialled):
    """Between them it is a mean: tokens take whole slices. The last token of a row is never the pinned first one."""
    geometry, low = dialled.geometry, dialled.method.floor(dialled.geometry)
    for compute, native in ((1.0, 0.0), (low, 1e9)):
        ids = tiny_windows(1, 12)
        mask = torch.ones_like(ids)
        cache = dialled.method.make_cache(dialled.model)
        with spend(native={"dynamoe": native}) as meter, torch.no_grad():
            dialled.method.prefill(dialled.model, ids[:, :11], mask[:, :11], cache)
        with spend(native={"dynamoe": native}) as meter, counting(dialled) as counted:
            dialled.method.decode(dialled.model, ids[:, 11:], mask, cache)
        formula = dialled.method.cost(geometry, compute=compute, num_tokens=1, past=11, itemsize=4)
        assert meter.cost == formula
        agree(dialled, formula, counted)


# -- side passes


@pytest.mark.parametrize("part", ["auxiliary", "draft"])
def test_a_side_pass_is_charged_whole_and_saves_nothing(part):
    adapted = plain("qwen3")
    ids = tiny_windows(1, 8)
    with spend(1.0) as meter, torch.no_grad():
        adapted(input_ids=ids, use_cache=False)
        before, dense = meter.cost, meter.dense
        with meter.charging(part):
            adapted(input_ids=ids[:, :5], use_cache=False)
        adapted(input_ids=ids, use_cache=False)
    side = dense_cost(adapted.geometry, num_tokens=5, past=0, num_logits=5, itemsize=4).charged_to(part)
    assert meter.cost == before + side + before
    assert meter.dense == dense + dense
    assert (meter.tokens, meter.num_side_tokens[part]) == (16, 5)
    assert len(meter.passes) == 2
    assert meter.token_fractions() == [1.0] * 16
    assert meter.compute > 1


# -- what the dial counts and what generation spends


@pytest.mark.parametrize("num_new", [1, 6])
def test_a_prompt_takes_the_head_once(dialled, num_new):
    """docs/dial.md: the dial is measured with the head at every position; `generate` takes it once a prompt."""
    geometry = dialled.geometry
    ids = tiny_windows(1, 12)
    settings = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": None}
    with spend(1.0) as meter:
        dialled.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    head = 2 * geometry.head_weights
    num_tokens = 12 + num_new - 1
    at_every_position = num_tokens * geometry.token_flops
    assert at_every_position - meter.dense.flops.flat == (12 - 1) * head
