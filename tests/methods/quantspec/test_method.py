"""QuantSpec as a method: settings, cost, drafts, and company."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.caches.hierarchical import HierarchicalCache
from rheostat.errors import SettingError
from rheostat.geometry import Geometry
from rheostat.methods import Chain, DynaMoE, Method, QuantSpec, make_method
from rheostat.methods.quantspec.twins import TwinLinear
from rheostat.spending import spend
from tests.tiny import SMOLLM2, tiny_model, tiny_windows


def test_settings_survive_a_round_trip():
    method = QuantSpec(group_size=32, draft_weights=("ffn",), weight_group_size=16)
    assert make_method(method.to_dict()) == method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "quantspec.group_size=0"),
        ({"value_group_size": -1}, "quantspec.value_group_size=-1"),
        ({"weight_group_size": 7}, "quantspec.weight_group_size=7: must be an even integer"),
        ({"draft_weights": ("ffn", "router")}, "quantspec.draft_weights=.*must be a list of ffn, attention, head"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(SettingError, match=message):
        QuantSpec(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_group_size": 3, "weight_group_size": 8}, "value_group_size=3: must be a divisor of the head width, 8"),
        ({"weight_group_size": 48}, "weight_group_size=48: must be a divisor of every width it quantises, 32 among"),
    ],
)
def test_groups_that_do_not_divide_the_model_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Adapted(tiny_model(), QuantSpec(**settings))


def test_it_is_attached_once():
    adapted = Adapted(tiny_model(), QuantSpec(weight_group_size=8))
    with pytest.raises(SettingError, match="has QuantSpec attached already"):
        QuantSpec(weight_group_size=8).attach(adapted.model)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("parts", [(), ("ffn",), ("attention", "head"), ("ffn", "attention", "head")])
def test_the_parts_named_are_those_that_are_swapped(family, parts):
    adapted = Adapted(tiny_model(family), QuantSpec(weight_group_size=8, draft_weights=parts))
    names = {name for name, module in adapted.model.named_modules() if isinstance(module, TwinLinear)}
    kinds = {"ffn" if ".mlp." in name else "attention" if ".self_attn." in name else "head" for name in names}
    assert kinds == set(parts)


def test_the_cache_s_reading_is_in_the_cost_and_the_meter_agrees():
    adapted = Adapted(tiny_model(), QuantSpec(group_size=4, weight_group_size=8))
    cache, ids = adapted.method.make_cache(adapted.model), tiny_windows(1, 30)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        adapted.method.prefill(adapted.model, ids[:, :29], mask[:, :29], cache)
        with spend() as meter:
            adapted.method.decode(adapted.model, ids[:, 29:], mask, cache)
    geometry = Geometry.from_config(adapted.config)
    assert meter.cost == adapted.method.cost(geometry, num_tokens=1, past=29, itemsize=4)
    assert (
        meter.cost.bytes.scores
        < meter.dense.bytes.scores
        == Method().cost(geometry, num_tokens=1, past=29, itemsize=4).bytes.scores
    )


def test_bytes_a_token_of_a_real_model():
    method, past = QuantSpec(), 8192
    full = past * SMOLLM2.kv_values * SMOLLM2.num_layers * 2
    body = (past - 128) / past
    for bits in (8, 4):
        share = 1 - method.cache_savings(SMOLLM2, past, 2, bits) / full
        # 32 bits a group: 128 tokens of a key's channel, 64 channels of a value.
        assert share == pytest.approx(1 - body + body * (bits + (32 / 128 + 32 / 64) / 2) / 16)


def test_a_draft_of_its_own_belongs_to_the_decode_stage():
    assert Method().drafter() is None
    assert QuantSpec().drafter() is not None
    chain = Chain([DynaMoE(), QuantSpec()])
    assert chain.drafter() is not None
    assert "cache" in chain.acts_at()
    assert "cache" not in Chain([DynaMoE()]).acts_at()
    assert Chain([DynaMoE()]).drafter() is None


def test_rejected_drafts_leave_no_four_bit_numbers_behind():
    adapted = Adapted(tiny_model("qwen3").double(), QuantSpec(group_size=64, weight_group_size=8))
    cache = adapted.method.make_cache(adapted.model)
    assert isinstance(cache, HierarchicalCache)
    ids = tiny_windows(1, 12)
    out = adapted.generate(
        input_ids=ids, speculate="self", max_new_tokens=20, do_sample=False, eos_token_id=None, past_key_values=cache
    )
    with torch.no_grad():
        wanted = adapted.model(input_ids=out[:, :-1]).past_key_values
    for mine, other in zip(cache.layers, wanted.layers, strict=True):
        torch.testing.assert_close(mine.contents()[0], other.keys, rtol=1e-9, atol=1e-9)
