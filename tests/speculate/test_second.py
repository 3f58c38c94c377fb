"""A second model as the drafter (that its text is right: `test_loop`)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from rheostat.adapted import Adapted
from rheostat.cost import dense_cost
from rheostat.errors import SettingError
from rheostat.speculate.loop import Ending, speculate
from rheostat.speculate.second import SecondModel, check_tokenizers
from rheostat.spending import spend
from tests.conftest import byte_tokenizer
from tests.tiny import SIZES, VOCAB, tiny_model, tiny_windows


def write(adapted: Adapted, drafter: SecondModel) -> None:
    list(
        speculate(adapted.model, adapted.method, tiny_windows(1, 9), drafter=drafter, ending=Ending(max_new_tokens=12))
    )


def test_a_twin_is_always_right_and_billed_for_each_of_its_passes():
    adapted, drafter = Adapted(tiny_model("qwen3")), SecondModel(tiny_model("qwen3"))
    with spend() as meter:
        write(adapted, drafter)
    assert meter.speculation.acceptance == 1
    one = dense_cost(adapted.geometry, num_tokens=1, past=0, num_logits=1, itemsize=4)
    assert meter.cost.flops.draft > sum(meter.speculation.drafted) * one.flops.flat  # the prompt too
    assert drafter.cache.get_seq_length() < 9 + 12


def test_another_vocabulary_is_refused():
    config = CONFIG_MAPPING["llama"](**SIZES | {"vocab_size": VOCAB + 1})
    with pytest.raises(SettingError, match=f"drafter='a vocabulary of {VOCAB + 1}': must be of the model's, {VOCAB}"):
        write(Adapted(tiny_model()), SecondModel(AutoModelForCausalLM.from_config(config)))


def test_tokenizers_that_differ_are_refused():
    ours, theirs = byte_tokenizer(), byte_tokenizer()
    check_tokenizers(ours, theirs)
    theirs.add_tokens(["<new>"])
    with pytest.raises(SettingError, match="drafter: must have the model's tokenizer; token '<new>' is None here and"):
        check_tokenizers(ours, theirs)


def test_padding_is_not_billed_and_the_drafts_tokens_are_counted():
    ids, bills = tiny_windows(1, 9), []
    for num_pads in (0, 7):
        mask = pad(torch.ones_like(ids), (num_pads, 0))
        adapted, drafter = Adapted(tiny_model()), SecondModel(tiny_model())
        ending = Ending(max_new_tokens=12)
        with spend() as meter:
            list(
                speculate(adapted.model, adapted.method, pad(ids, (num_pads, 0)), mask, drafter=drafter, ending=ending)
            )
        bills.append((meter.cost.flops, meter.cost.bytes, meter.num_side_tokens["draft"]))
    assert bills[0] == bills[1]
    flops, _, num_tokens = bills[0]
    one = dense_cost(adapted.geometry, num_tokens=1, past=0, num_logits=0, itemsize=4)
    num_logits, rest = divmod(flops.draft - num_tokens * one.flops.flat, 2 * adapted.geometry.head_weights)
    assert rest == 0
    assert num_logits > 1
    assert num_tokens >= 8 + num_logits - 1  # the prompt in one pass, then a token or two in each
