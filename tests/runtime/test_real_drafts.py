"""A small sample of `benchmarks/exactness.py`: drafts on real prompts, alone and in a batch, over several flushes."""

from __future__ import annotations

import pytest

import rheostat
from rheostat.adapted import Adapted
from rheostat.kernels import library
from rheostat.methods import QuantSpec
from rheostat.runtime.speculating import NativeHost
from rheostat.speculate.lookup import PromptLookup
from rheostat.speculate.loop import Ending, speculate
from rheostat.spending import spend
from tests.speculate.test_loop import text_of

pytestmark = [pytest.mark.model, pytest.mark.skipif(library() is None, reason="no compiler")]

PROMPTS = (
    "The river runs to the sea, and the sea feeds the clouds that feed the river. The river runs to the sea, and the",
    "Write one sentence about",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return a - b\n\ndef multiply(a, b):\n",
)
G, NEW = 8, 40


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_drafts_of_the_bundled_model_change_no_token(weights):
    model, tokenizer = rheostat.load("smollm2-135m", dtype="float32")
    adapted = Adapted(model, QuantSpec(group_size=G, draft_weights=("ffn", "attention", "head")))
    tokenizer.padding_side = "left"
    for texts in (PROMPTS[:1], PROMPTS[1:2], PROMPTS):
        given = dict(tokenizer(list(texts), return_tensors="pt", padding=True))
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        out = adapted.generate(**given, **settings, runtime="native", weights=weights)
        wanted = out[:, given["input_ids"].shape[1] :].tolist()
        for drafter, least in ((adapted.method.drafter(), 0.4), (PromptLookup(), 0.0)):
            host = adapted.draft_host(drafter, "native", weights)
            assert isinstance(host, NativeHost)
            with spend() as meter:
                rounds = speculate(
                    adapted.model,
                    adapted.method,
                    **given,
                    drafter=drafter,
                    ending=Ending(max_new_tokens=NEW),
                    host=host,
                )
                assert text_of(list(rounds)) == wanted
            assert meter.speculation.acceptance >= least
