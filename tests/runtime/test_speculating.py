"""Speculation on our own runtime: the text of its plain decoding, token for token, and the bill."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.kernels import library
from rheostat.methods import Chain, Method, QuantSpec
from rheostat.runtime.speculating import NativeHost
from rheostat.sampling import Sampling
from rheostat.speculate.drafter import Drafter
from rheostat.speculate.drafting import LowDial, SelfDrafter
from rheostat.speculate.lookup import PromptLookup
from rheostat.speculate.loop import Ending, speculate
from rheostat.speculate.second import SecondModel
from rheostat.spending import spend
from tests.methods.kv_prediction.given import given
from tests.speculate.test_loop import LENGTHS, MASK, PROMPTS, text_of
from tests.tiny import tiny_adapted, tiny_model

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler")

G, NEW = 8, 30


def quantspec(family: str = "qwen3") -> Adapted:
    parts = ("ffn", "attention", "head")
    return Adapted(tiny_model(family), QuantSpec(group_size=G, weight_group_size=8, draft_weights=parts))


def plain(adapted: Adapted, ids, mask, weights: str = "auto", number: int = NEW) -> list[list[int]]:
    out = adapted.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=number,
        do_sample=False,
        eos_token_id=None,
        runtime="native",
        weights=weights,
    )
    return out[:, ids.shape[1] :].tolist()


def drafted(adapted: Adapted, ids, mask, drafter, weights: str = "auto", number: int = NEW, **settings):
    host = adapted.draft_host(drafter, "native", weights)
    assert isinstance(host, NativeHost)
    ending = settings.pop("ending", Ending(max_new_tokens=number))
    return list(
        speculate(adapted.model, adapted.method, ids, mask, drafter=drafter, ending=ending, host=host, **settings)
    )


DRAFTERS = {
    "none": Drafter,
    "itself": SelfDrafter,
    "prompt_lookup": PromptLookup,
    "second model": lambda: SecondModel(tiny_model("qwen3", seed=1)),
    "four bits": lambda: QuantSpec().drafter(),
}
DRAFTERS["none"] = type("NoDrafts", (Drafter,), {"needs_cache": False})


@pytest.mark.parametrize("method", ["plain", "planes"])
@pytest.mark.parametrize("name", list(DRAFTERS))
def test_greedy_text_is_that_of_plain_decoding(name, method):
    adapted = quantspec() if method == "planes" else Adapted(tiny_model("qwen3"))
    wanted = plain(adapted, PROMPTS, MASK)
    assert len({token for row in wanted for token in row}) > 10
    for rows in (slice(0, 8), slice(0, 1), slice(3, 4)):
        start = 20 - max(LENGTHS[rows])
        for length in (1, 5, "auto"):
            given = drafted(adapted, PROMPTS[rows, start:], MASK[rows, start:], DRAFTERS[name](), draft_length=length)
            assert text_of(given) == wanted[rows]


@pytest.mark.parametrize("weights", ["bf16", "fp16", "int8", "int4"])
def test_formats_of_fewer_bits_round_alike(weights):
    """A check of several tokens rounds as steps of one do: the text is equal in every format, not nearly."""
    adapted = quantspec()
    wanted = plain(adapted, PROMPTS, MASK, weights)
    for drafter in (PromptLookup(), DRAFTERS["four bits"](), SelfDrafter()):
        assert text_of(drafted(adapted, PROMPTS, MASK, drafter, weights)) == wanted


def test_native_text_is_that_of_transformers():
    adapted = quantspec()
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "attention_mask": MASK}
    native = adapted.generate(PROMPTS, speculate="self", runtime="native", **kwargs)
    stock = adapted.generate(PROMPTS, speculate="self", runtime="stock", **kwargs)
    assert torch.equal(native, stock)
    assert torch.equal(native, adapted.generate(PROMPTS, runtime="stock", **kwargs))


@pytest.mark.parametrize("planes", [False, True])
def test_a_low_dial_drafts_for_any_dial(planes):
    adapted = tiny_adapted("qwen3", tile=32) if planes else tiny_adapted("qwen3")
    if planes:
        method = QuantSpec(group_size=G, weight_group_size=8)
        method.attach(adapted.model)
        adapted.method = Chain([adapted.method, method])
    compute = (1 + adapted.dial.low) / 2
    with spend(compute):
        wanted = plain(adapted, PROMPTS, MASK)
    drafters: list[Drafter] = [LowDial(adapted.dial.low), PromptLookup()]
    drafters += [adapted.method.drafter()] if planes else []
    for drafter in drafters:
        with spend(compute) as meter:
            assert text_of(drafted(adapted, PROMPTS, MASK, drafter)) == wanted
        assert meter.speculation.num_rounds > 0


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("name", ["itself", "prompt_lookup", "four bits"])
def test_the_bill_is_that_of_transformers(name, planes):
    bills = []
    adapted = quantspec("llama") if planes else Adapted(tiny_model("llama"))
    if name == "four bits" and not planes:
        return
    for runtime in ("native", "stock"):
        with spend() as meter:
            adapted.generate(
                PROMPTS[:1],
                attention_mask=MASK[:1],
                speculate=DRAFTERS[name]() if name != "four bits" else "self",
                draft_length=3,
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                runtime=runtime,
            )
        bills.append(meter)
    ours, theirs = bills
    if name != "four bits":  # whose 4-bit weights are rounded otherwise, so that other drafts are made
        assert ours.cost == theirs.cost
        assert ours.num_side_tokens == theirs.num_side_tokens
        assert ours.speculation.to_dict() == theirs.speculation.to_dict()
    assert ours.dense == theirs.dense
    assert ours.num_decode_tokens == theirs.num_decode_tokens == NEW - 1


def test_plain_decoding_on_planes_is_billed_alike():
    adapted = quantspec("llama")
    bills = []
    for runtime in ("native", "stock"):
        with spend() as meter:
            adapted.generate(
                PROMPTS[:1],
                attention_mask=MASK[:1],
                max_new_tokens=NEW,
                eos_token_id=None,
                do_sample=False,
                runtime=runtime,
            )
        bills.append(meter)
    assert bills[0].cost == bills[1].cost


def test_sampled_text_has_the_law_of_plain_decoding():
    adapted, rows, heat = Adapted(tiny_model("qwen3")), 1500, 6.0
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    with torch.inference_mode():
        first = (adapted.model(ids).logits[0, -1] / heat).softmax(-1)
        longer = torch.cat([ids.expand(len(first), -1), torch.arange(len(first))[:, None]], 1)
        p = first @ (adapted.model(longer).logits[:, -1] / heat).softmax(-1)  # of the second token
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=heat)
    with spend() as meter:
        rounds = drafted(
            adapted, ids.expand(rows, -1), None, PromptLookup(1), number=4, sampling=sampling, generator=generator
        )
    assert 0.005 < meter.speculation.acceptance < 0.9
    counts = torch.bincount(torch.tensor([row[1] for row in text_of(rounds)]), minlength=len(p))
    big = p * rows >= 5
    chi = float(((counts - p * rows).square() / (p * rows))[big].sum())
    assert int(big.sum()) > 20
    assert chi < int(big.sum()) + 4 * (2 * int(big.sum())) ** 0.5


def test_ends_inside_a_draft():
    adapted = quantspec()
    wanted = plain(adapted, PROMPTS[:1], MASK[:1])[0]
    end = wanted[NEW // 2]
    stop = wanted.index(end) + 1
    ending = Ending(max_new_tokens=NEW, eos_token_ids=(end,))
    rounds = drafted(adapted, PROMPTS[:1], MASK[:1], SelfDrafter(), draft_length=6, ending=ending)
    assert text_of(rounds) == [wanted[:stop]]


@pytest.mark.parametrize("with_planes", [False, True])
def test_drafts_after_a_predicted_prompt(with_planes):
    """Reading ahead, a cache in planes and drafts go together, on both runtimes."""
    adapted = given("qwen3")
    if with_planes:
        planes = QuantSpec(group_size=G, weight_group_size=8)
        planes.attach(adapted.model)
        adapted.method = Chain([adapted.method, planes])
    compute = {"prefill": adapted.dial.low}
    texts = {}
    for runtime in ("native", "stock"):
        kwargs = {"attention_mask": MASK, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        for speculate_by in (None, "prompt_lookup", *(["self"] if with_planes else [])):
            with spend(compute) as meter:
                out = adapted.generate(PROMPTS, runtime=runtime, speculate=speculate_by, **kwargs)
            texts[runtime, speculate_by] = out.tolist()
            assert meter.num_side_tokens["auxiliary"] > 0
    assert len({str(text) for text in texts.values()}) == 1
    if with_planes:
        adapted.method.methods[1].detach(adapted.model)


@pytest.mark.parametrize("length", [0, 65, -1, True, 2.5, "some"])
def test_a_bad_draft_length_is_one_clear_line(length):
    adapted = Adapted(tiny_model("qwen3"))
    with pytest.raises(SettingError, match="draft_length=.*an integer from 1 to 64, or auto"):
        adapted.generate(PROMPTS[:1], speculate="prompt_lookup", draft_length=length)
    assert not adapted._runtimes  # before anything was packed


def test_groups_that_do_not_fit_the_kernels_go_to_transformers():
    adapted = Adapted(tiny_model("qwen3"), QuantSpec(group_size=G, value_group_size=4, weight_group_size=8))
    assert adapted.draft_host(PromptLookup()) is None
    with pytest.raises(SettingError, match="value_group_size=4"):
        adapted.draft_host(PromptLookup(), "native")
    for settings, message in (({"group_size": 0}, "group_size=0"), ({"value_group_size": 3}, "divisor of the head")):
        with pytest.raises(SettingError, match=message):
            Adapted(tiny_model("qwen3"), QuantSpec(weight_group_size=8, **settings))


def test_a_draft_in_4_bits_of_a_slice_is_billed_as_the_slice():
    """A dial below 1 reads less of the FFN, and 4 bits of that: the credit shrinks with it, on both runtimes."""
    adapted = tiny_adapted("qwen3", tile=32)
    method = QuantSpec(group_size=G, weight_group_size=32, draft_weights=("ffn",))
    method.attach(adapted.model)
    adapted.method = Chain([adapted.method, method])
    for runtime in ("native", "stock"):
        per_token: dict[float, float] = {}
        for compute in (1.0, adapted.dial.low):
            with spend(compute) as meter:
                adapted.generate(
                    PROMPTS[:1],
                    speculate="self",
                    runtime=runtime,
                    max_new_tokens=12,
                    do_sample=False,
                    eos_token_id=None,
                )
            read = meter.side_bytes["ffn"]  # in full bits, what 4-bit copies exist of
            others = sum(n for part, n in meter.side_bytes.items() if part not in ("ffn", "scores", "draft"))
            own = meter.cost.bytes.draft - others - read * 5 // 32  # re-fitted projections, of which stock has no copy
            if runtime == "stock" and compute < 1:
                assert own > 0
            else:
                assert abs(own) <= meter.speculation.num_rounds  # bytes are whole numbers
            per_token[compute] = read / meter.num_side_tokens["draft"]
        assert 0 < per_token[adapted.dial.low] < per_token[1.0]


def test_what_looks_into_the_cache_runs_on_transformers():
    adapted = Adapted(tiny_model("qwen3"))
    assert adapted.draft_host(Drafter()) is None
    with pytest.raises(SettingError, match="runtime=native.*looks into the cache"):
        adapted.draft_host(Drafter(), "native")
    assert Method().cache_form() is None
