"""Speculation writes what plain decoding writes: all drafters, batches, ends, caches."""

from __future__ import annotations

import pytest
import torch
from transformers import QuantizedCache, StaticCache

from rheostat.adapted import Adapted
from rheostat.caches.counting import body_length
from rheostat.caches.hierarchical import HierarchicalCache
from rheostat.errors import SettingError
from rheostat.methods import Chain, DynaMoE, Method, QuantSpec
from rheostat.sampling import Sampling
from rheostat.speculate.drafter import LONGEST_DRAFT, Drafter, Stopping
from rheostat.speculate.drafting import LowDial, SelfDrafter
from rheostat.speculate.lookup import PromptLookup
from rheostat.speculate.loop import Ending, Round, speculate
from rheostat.speculate.second import SecondModel
from rheostat.speculate.sparse import SnapKV, StreamingLLM
from rheostat.spending import spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

G = 4
LENGTHS = (20, 13, 6, 3, 8, 7, 17, 9)
"""On both sides of the buffer's 2G tokens."""
MASK = torch.tensor([[0] * (20 - n) + [1] * n for n in LENGTHS])
PROMPTS = tiny_windows(8, 20) * MASK
NEW = 24

SLOW_DIALS = [(1.0, True), (1.0, False), (0.5, False)]

DRAFTERS = {
    "none": Drafter,
    "itself": SelfDrafter,
    "careful": lambda: SelfDrafter(Stopping(risk=0.3)),
    "prompt_lookup": PromptLookup,
    "second model": lambda: SecondModel(tiny_model("qwen3", seed=1).double()),
    "its twin": lambda: SecondModel(tiny_model("qwen3").double()),
    "streaming_llm": StreamingLLM,
    "snapkv": SnapKV,
    "four bits": lambda: QuantSpec().drafter(),
}


def quantspec(family: str = "qwen3") -> Adapted:
    parts = ("ffn", "attention", "head")
    return Adapted(tiny_model(family).double(), QuantSpec(group_size=G, weight_group_size=8, draft_weights=parts))


def plain(adapted: Adapted, ids: torch.Tensor, mask: torch.Tensor, number: int = NEW) -> list[list[int]]:
    out = adapted.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=number, do_sample=False, eos_token_id=None
    )
    return out[:, ids.shape[1] :].tolist()


def rounds_of(adapted: Adapted, ids, mask, drafter, number: int = NEW, **settings) -> list[Round]:
    ending = settings.pop("ending", Ending(max_new_tokens=number))
    return list(speculate(adapted.model, adapted.method, ids, mask, drafter=drafter, ending=ending, **settings))


def text_of(rounds: list[Round]) -> list[list[int]]:
    return [[t for one in rounds for t in one.token_ids[row].tolist()] for row in range(len(rounds[0].token_ids))]


@pytest.mark.parametrize(
    "length", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(9, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", list(DRAFTERS))
def test_greedy_text_is_that_of_plain_decoding(name, length):
    adapted = quantspec()
    wanted = plain(adapted, PROMPTS, MASK)
    assert len({token for row in wanted for token in row}) > 10
    for rows in (slice(0, 8), slice(0, 1), slice(3, 4)):  # a batch, and a prompt on each side of the buffer's size
        start = 20 - max(LENGTHS[rows])
        given = rounds_of(adapted, PROMPTS[rows, start:], MASK[rows, start:], DRAFTERS[name](), draft_length=length)
        assert text_of(given) == wanted[rows]
    # The shortest prompt's row began with an empty body, and every row crossed several flushes.
    assert min((body_length(n + NEW - 1, G) - body_length(n, G)) // G for n in LENGTHS) >= 3


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("name", ["itself", "prompt_lookup"])
def test_every_family_windows_and_all(family, name):
    adapted = Adapted(tiny_model(family).double())
    wanted = plain(adapted, PROMPTS, MASK)
    assert text_of(rounds_of(adapted, PROMPTS, MASK, DRAFTERS[name]())) == wanted


@pytest.mark.parametrize("name", ["prompt_lookup", "careful", "second model"])
def test_gemma_2_single_rows(name):
    adapted = Adapted(tiny_model("gemma2"))
    drafter = SecondModel(tiny_model("gemma2", seed=1)) if name == "second model" else DRAFTERS[name]()
    wanted = plain(adapted, PROMPTS[:1], MASK[:1])
    assert text_of(rounds_of(adapted, PROMPTS[:1], MASK[:1], drafter)) == wanted


@pytest.mark.parametrize(
    ("share", "with_cache"), [(0.5, True), *[pytest.param(*one, marks=pytest.mark.slow) for one in SLOW_DIALS]]
)
def test_a_low_dial_drafts_for_any_dial(share, with_cache):
    adapted = tiny_adapted("qwen3")
    adapted.model.double()
    adapted.model.eval()
    if with_cache:
        method = QuantSpec(group_size=G, weight_group_size=8)
        method.attach(adapted.model)
        adapted.method = Chain([adapted.method, method])
    compute = 1 - (1 - adapted.dial.low) * (1 - share)
    with spend(compute):
        wanted = plain(adapted, PROMPTS, MASK)
    drafters: list[Drafter] = [LowDial(adapted.dial.low), PromptLookup()]
    drafters += [adapted.method.drafter()] if with_cache else []
    for drafter in drafters:
        with spend(compute) as meter:
            rounds = rounds_of(adapted, PROMPTS, MASK, drafter)
        assert text_of(rounds) == wanted
        assert meter.speculation.num_rounds > 0
    assert not with_cache or any(one.name == DynaMoE.name for one in adapted.method.methods)


def test_the_model_as_its_own_draft_is_always_right():
    with spend() as meter:
        rounds = rounds_of(quantspec(), PROMPTS, MASK, SelfDrafter(), draft_length=3)
    assert meter.speculation.acceptance == 1
    assert {len(t) for t in rounds[1].token_ids} <= {1, 2, 3, 4}


def test_figures_add_up():
    adapted = quantspec()
    with spend() as meter:
        rounds = rounds_of(adapted, PROMPTS, MASK, DRAFTERS["second model"]())
    stats = meter.speculation
    written = sum(len(t) for one in rounds[1:] for t in one.token_ids)
    assert written == stats.num_rounds + sum(stats.accepted) == 8 * (NEW - 1)
    assert stats.tokens_per_round == pytest.approx(1 + stats.acceptance * sum(stats.drafted) / stats.num_rounds)
    assert meter.num_decode_tokens == written
    assert meter.num_prefill_tokens == sum(LENGTHS)
    assert meter.compute > 1  # rejected tokens were computed too


def test_the_dense_bill_is_that_of_plain_decoding():
    adapted = Adapted(tiny_model("qwen3"))
    with spend() as wanted:
        adapted.generate(
            input_ids=PROMPTS[:1], attention_mask=MASK[:1], max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    with spend() as meter:
        rounds_of(adapted, PROMPTS[:1], MASK[:1], PromptLookup(), 12)
    assert meter.dense == wanted.dense
    with spend() as batch:
        rounds_of(adapted, PROMPTS[:1].expand(3, -1), MASK[:1].expand(3, -1), PromptLookup(), 12)
    assert batch.dense.flops == wanted.dense.flops.times(3)
    assert batch.dense.bytes.head == wanted.dense.bytes.head  # weights are read once for all rows


def test_a_draft_is_billed_as_one():
    adapted = quantspec()
    with spend() as meter:
        rounds_of(adapted, PROMPTS[:1], MASK[:1], adapted.method.drafter())
    drafted = meter.num_side_tokens["draft"]
    assert drafted == sum(meter.speculation.drafted)
    assert meter.cost.flops.draft == drafted * adapted.geometry.token_flops
    full = drafted * adapted.geometry.token_flops // 2 * 8  # bytes of all weights in float64
    assert 0.05 * full < meter.cost.bytes.draft < 0.25 * full


@pytest.mark.parametrize("name", ["itself", "prompt_lookup", "second model"])
def test_rows_end_at_their_end_token(name):
    adapted = quantspec()
    free = plain(adapted, PROMPTS, MASK)
    ends = (free[0][5], free[3][9])
    rounds = rounds_of(adapted, PROMPTS, MASK, DRAFTERS[name](), ending=Ending(max_new_tokens=NEW, eos_token_ids=ends))
    for mine, all_ in zip(text_of(rounds), free, strict=True):
        stop = next((i + 1 for i, token in enumerate(all_) if token in ends), NEW)
        assert mine == all_[:stop]
    assert rounds[-1].is_last.all()


@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_the_limit_inside_a_draft(number):
    adapted = quantspec()
    rounds = rounds_of(adapted, PROMPTS, MASK, SelfDrafter(), number, draft_length=4)
    assert text_of(rounds) == plain(adapted, PROMPTS, MASK, number)


def test_a_stop_string_inside_a_draft():
    adapted = quantspec()
    free = plain(adapted, PROMPTS[:2], MASK[:2])

    def decode(ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    stop = decode(free[0][6:8])
    ending = Ending(max_new_tokens=NEW, stop_strings=(stop, "never"), decode=decode)
    rows = text_of(rounds_of(adapted, PROMPTS[:2], MASK[:2], SelfDrafter(), ending=ending))
    for mine, all_ in zip(rows, free, strict=True):
        first = next((i for i in range(1, NEW + 1) if stop in decode(all_[:i])), NEW)
        assert mine == all_[:first]


def test_the_cache_afterwards_is_that_of_plain_decoding():
    adapted = quantspec()
    caches = [HierarchicalCache(adapted.config, group_size=G, attention_mask=MASK[:1]) for _ in range(2)]
    rounds_of(adapted, PROMPTS[:1], MASK[:1], DRAFTERS["second model"](), cache=caches[0])
    text = torch.tensor(plain(adapted, PROMPTS[:1], MASK[:1]))
    adapted.model.generate(
        input_ids=PROMPTS[:1], past_key_values=caches[1], max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 20 + text.shape[1] - 1
    for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert mine.body_lengths == other.body_lengths
        for a, b in zip(mine.contents(), other.contents(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_sampling_is_fixed_by_the_generator_and_differs_by_seed():
    adapted = quantspec()
    texts = [
        text_of(
            rounds_of(
                adapted,
                PROMPTS,
                MASK,
                adapted.method.drafter(),
                sampling=Sampling(temperature=3.0, top_k=40),
                generator=torch.Generator().manual_seed(seed),
            )
        )
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_drawn_draft_keeps_the_law_of_a_real_model():
    """The second token's law, after any first one, against the model's own: 4,000 rows at once."""
    from rheostat.sampling import probabilities

    adapted = Adapted(tiny_model("qwen3"))
    sampling = Sampling(temperature=4.0, top_k=6)
    ids = tiny_windows(1, 6)
    rounds = rounds_of(
        adapted,
        ids.expand(4000, -1),
        None,
        SecondModel(tiny_model("qwen3", seed=1)),
        3,
        draft_length=2,
        sampling=sampling,
        generator=torch.Generator().manual_seed(0),
    )
    text = torch.tensor(text_of(rounds))
    firsts, counts = text[:, 0].unique(return_counts=True)
    with torch.no_grad():
        longer = torch.cat([ids.expand(len(firsts), -1), firsts[:, None]], 1)
        p = probabilities(adapted(input_ids=longer).logits[:, -1], sampling).double()
    seen = torch.stack([torch.bincount(text[text[:, 0] == f, 1], minlength=p.shape[1]) for f in firsts])
    expected = p * counts[:, None]
    possible = expected > 0
    assert not seen[~possible].any()
    chi = float(((seen - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - len(firsts)
    assert chi < freedom + 4.5 * (2 * freedom) ** 0.5


# -- bad input


@pytest.mark.parametrize("length", [0, -1, LONGEST_DRAFT + 1, 10**9, True])
def test_a_draft_length_out_of_range_names_itself(length):
    with pytest.raises(SettingError, match=f"draft_length={length}: must be an integer from 1 to {LONGEST_DRAFT}"):
        rounds_of(quantspec(), PROMPTS, MASK, Drafter(), draft_length=length)


def test_caches_that_cannot_take_tokens_back_are_refused():
    adapted = Adapted(tiny_model())
    for cache in (StaticCache(config=adapted.config, max_cache_len=64), _stock_quantised(adapted)):
        with pytest.raises(SettingError, match="past_key_values=.*must be a cache that can take tokens back"):
            rounds_of(adapted, PROMPTS, MASK, PromptLookup(), cache=cache)


def _stock_quantised(adapted: Adapted):
    from transformers.cache_utils import Cache, QuantizedLayer

    assert issubclass(QuantizedCache, Cache)
    return Cache(layer_class_to_replicate=QuantizedLayer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids=\(1, 0\): must be of shape"),
        ({"input_ids": PROMPTS, "attention_mask": MASK.flip(1)}, "attention_mask=.*with padding on the left only"),
    ],
)
def test_bad_prompts_name_themselves(arguments, message):
    with pytest.raises(SettingError, match=message):
        next(speculate(tiny_model(), Method(), drafter=Drafter(), **arguments))


def test_bad_endings_name_themselves():
    with pytest.raises(SettingError, match="max_new_tokens=0"):
        Ending(max_new_tokens=0)
    with pytest.raises(SettingError, match="stop_strings=.*given together with the tokenizer"):
        Ending(stop_strings=("x",))
    with pytest.raises(SettingError, match="risk=0: must be above 0"):
        Stopping(risk=0)
