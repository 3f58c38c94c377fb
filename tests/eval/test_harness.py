"""The adapter beside lm-eval's own one for `transformers`: at full compute they agree on every kind of request."""

from __future__ import annotations

import gzip
import logging
import os
from pathlib import Path

import pytest
import torch

import rheostat
from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.eval.harness import make_lm
from rheostat.eval.tasks import TASKS
from rheostat.processes import Ranks
from tests.conftest import byte_tokenizer
from tests.eval.conftest import HELLASWAG
from tests.eval.test_scoring import Hasty

CONTEXTS = (
    "Hello world",
    "A",
    "The quick brown fox jumped over",
    "ünï→ 日本",
    "",
    " x ",
    "a long one, and longer " * 15,
)
CONTINUATIONS = (" yes", " no, not really", " é→", "!", "\n", "</s>")
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
TEXTS = [("short",), ("",), ("ünï→ " * 10,), ("".join(f"Stone {n} is {n * n} grams. " for n in range(40)),)]
STOPS = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
PROMPTS = [
    *((context, STOPS) for context in CONTEXTS if context),
    ("Hello", {"until": [], "max_gen_toks": 5}),
    ("Hello", {"until": ["zzz"], "max_gen_toks": 7, "temperature": 0.0}),
]


@pytest.fixture
def stock(reading_model, tiny_tokenizer):
    """lm-eval's own adapter, on the same model."""
    return stock_adapter(reading_model, tiny_tokenizer)


def stock_adapter(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal")


def ours(model, tokenizer, **options):
    return make_lm(Adapted(model), tokenizer, **options)


def assert_alike(found, wanted):
    assert [one for _, one in found] == [one for _, one in wanted]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=2e-4, rel=1e-6)


def test_log_likelihoods_are_those_of_the_stock_adapter(stock, reading_model, tiny_tokenizer, ask):
    requests = ask("loglikelihood", PAIRS)
    wanted = stock.loglikelihood(requests, disable_tqdm=True)
    lm = ours(reading_model, tiny_tokenizer, batch_tokens=300)
    assert_alike(lm.loglikelihood(requests), wanted)
    account = lm.close()
    assert account.modes == {"prefill+score"}
    assert account.num_requests == len(PAIRS)
    # Contexts of 345 tokens; 256 are read, and the last of a continuation is not.
    assert account.num_truncated == len(CONTINUATIONS)
    assert account.meter.compute == 1.0
    assert account.meter.tokens > 0


def test_rolling_log_likelihoods_are_those_of_the_stock_adapter(stock, reading_model, tiny_tokenizer, ask):
    requests = ask("loglikelihood_rolling", TEXTS)
    wanted = stock.loglikelihood_rolling(requests, disable_tqdm=True)
    lm = ours(reading_model, tiny_tokenizer)
    assert lm.loglikelihood_rolling(requests) == pytest.approx(wanted, rel=1e-6)
    account = lm.close()
    assert account.modes == {"forward"}
    assert account.num_requests == len(TEXTS)
    assert account.num_truncated == 0


def test_answers_are_those_of_the_stock_adapter(stock, reading_model, tiny_tokenizer, ask):
    requests = ask("generate_until", PROMPTS)
    wanted = stock.generate_until(requests, disable_tqdm=True)
    lm = ours(reading_model, tiny_tokenizer, batch_tokens=200)
    assert lm.generate_until(requests) == wanted
    account = lm.close()
    assert account.modes == {"generate"}
    assert account.num_requests == len(PROMPTS)
    assert account.num_truncated == 1
    assert 0 < account.num_unended <= len(PROMPTS)


def test_answers_end_at_stop_strings_and_at_the_end_token(reading_model, tiny_tokenizer, ask):
    lm = ours(reading_model, tiny_tokenizer)

    def answers(settings: dict) -> str:
        return lm.generate_until(ask("generate_until", [("Hello", {"max_gen_toks": 9} | settings)]))[0]

    whole = answers({"until": []})
    assert lm.account.num_unended == 1
    stop = whole[2:4]
    assert answers({"until": ["never", stop]}) == whole[: whole.index(stop)]
    assert answers({"until": stop}) == whole[: whole.index(stop)]
    lm._end_ids = {int(tiny_tokenizer(whole[0], add_special_tokens=False)["input_ids"][0])}
    assert answers({"until": []}) == ""
    assert lm.account.num_unended == 1


def test_empty_requests(reading_model, tiny_tokenizer, ask):
    lm = ours(reading_model, tiny_tokenizer)
    found = lm.loglikelihood(ask("loglikelihood", [("Hello", ""), ("", ""), ("", "<s>"), ("Hello", "!")]))
    assert found[:3] == [(0.0, True)] * 3  # nothing to predict; the last is the prefix itself
    assert found[3][0] < 0
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []
    alone = lm.generate_until(ask("generate_until", [("", {"max_gen_toks": 3}), ("<s>", {"max_gen_toks": 3})]))
    assert alone[0] == alone[1]


def test_a_method_that_decodes_its_own_way_is_named(reading_model, tiny_tokenizer, ask):
    requests = ask("loglikelihood", PAIRS[:12])
    wanted = ours(reading_model, tiny_tokenizer).loglikelihood(requests)
    lm = make_lm(Adapted(reading_model, Hasty()), tiny_tokenizer)
    assert_alike(lm.loglikelihood(requests), wanted)
    assert lm.account.modes == {"prefill+steps"}


def test_processes_share_whole_batches(reading_model, tiny_tokenizer, ask):
    """Three processes, one after the other: each hands in its own share, and their sum is what one alone has."""
    requests = ask("loglikelihood", PAIRS)
    adapted = Adapted(reading_model)  # one: two on a model would bill twice
    alone = make_lm(adapted, tiny_tokenizer, batch_tokens=100)
    wanted = alone.loglikelihood(requests)
    spent = alone.close().meter

    class Recorder(Ranks):
        def gather(self, mine):
            shares.append(mine)
            return [mine]

    shares: list = []
    costs = []
    for rank in range(3):
        lm = make_lm(adapted, tiny_tokenizer, batch_tokens=100, ranks=Recorder(rank, 3))
        with pytest.raises(KeyError):  # the others' results are missing
            lm.loglikelihood(requests)
        costs.append(lm.account.meter.cost)
    merged = {number: one for share in shares for number, one in share.items()}
    assert sum(map(len, shares)) == len(merged)
    assert all(shares)
    assert sorted(one.log_likelihood for one in merged.values()) == sorted(total for total, _ in wanted)
    assert costs[0] + costs[1] + costs[2] == spent.cost

    class Others(Ranks):
        def gather(self, mine):
            counts = {0: torch.tensor([3, 1])}
            return shares if isinstance(mine, dict) else [(cost, cost, 1, 2, counts) for cost in costs]

    lm = make_lm(adapted, tiny_tokenizer, batch_tokens=100, ranks=Others(1, 3))
    assert lm.loglikelihood(requests) == wanted
    meter = lm.close().meter
    assert meter.cost == meter.dense == spent.cost
    assert (meter.num_prefill_tokens, meter.num_decode_tokens) == (3, 6)
    assert meter.expert_counts[0].tolist() == [9, 3]


def test_drawn_answers_depend_on_the_seed_alone(reading_model, tiny_tokenizer, ask):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 3.0, "top_k": 50, "top_p": 0.9}
    requests = ask("generate_until", [(context, settings) for context in CONTEXTS])

    def drawn(seed: int) -> list[str]:
        return ours(reading_model, tiny_tokenizer, seed=seed).generate_until(requests)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 256}, "max_gen_toks=256: must be between 1 and 255"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_settings_of_generation_that_cannot_be_met(reading_model, tiny_tokenizer, ask, settings, message):
    lm = ours(reading_model, tiny_tokenizer)
    with pytest.raises(SettingError, match=message):
        lm.generate_until(ask("generate_until", [("Hello", settings)]))


def test_a_continuation_that_the_model_cannot_read(reading_model, tiny_tokenizer, ask):
    lm = ours(reading_model, tiny_tokenizer, max_length=8)
    assert lm.loglikelihood(ask("loglikelihood", [("Hello world", "x" * 8)]))[0][0] < 0
    assert lm.account.num_truncated == 1
    with pytest.raises(SettingError, match="answers have at most 8 tokens: one has 9"):
        lm.loglikelihood(ask("loglikelihood", [("Hello", "x" * 9)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens=0: must be 1 or more"),
        ({"max_length": 1}, "max_length=1: must be between 2 and 256"),
        ({"max_length": 257}, "max_length=257: must be between 2 and 256"),
    ],
)
def test_bad_settings(reading_model, tiny_tokenizer, options, message):
    with pytest.raises(SettingError, match=message):
        ours(reading_model, tiny_tokenizer, **options)


def test_a_tokenizer_is_needed(reading_model):
    with pytest.raises(SettingError, match="tokenizer=None: must be the model's tokenizer"):
        ours(reading_model, None)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(SettingError, match="one with an end-of-text token"):
        ours(reading_model, endless)


@pytest.mark.model
@pytest.mark.slow
def test_hellaswag_on_the_bundled_model_is_scored_as_the_stock_adapter_scores_it(tmp_path: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        (tmp_path / "mc").mkdir()
        (tmp_path / "mc" / "hellaswag_val.jsonl.gz").write_bytes(gzip.compress(HELLASWAG.read_bytes()))
        task = TASKS["hellaswag"](tmp_path)[0]
        task.build_all_requests()
        assert len(task.instances) == 32
        model, tokenizer = rheostat.load("smollm2-135m")
        wanted = stock_adapter(model, tokenizer).loglikelihood(task.instances, disable_tqdm=True)
        lm = ours(model, tokenizer)
        found = lm.loglikelihood(task.instances)
        assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=2e-3)
        assert [one for _, one in found] == [one for _, one in wanted]
    finally:
        torch.set_num_threads(before)
