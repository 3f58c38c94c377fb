"""Settings, sizes, saving: what a user may ask for and what is refused."""

from __future__ import annotations

import pytest
import torch

from rheostat import families
from rheostat.adapted import Adapted
from rheostat.artifact import save
from rheostat.errors import SettingError
from rheostat.methods import make_method
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.models import load
from rheostat.spending import spend
from tests.methods.kv_prediction.given import given
from tests.tiny import SMOLLM2, tiny_model, tiny_windows


@pytest.mark.parametrize(
    "settings",
    [
        {"depths": ()},
        {"depths": (0.5, -1)},
        {"depths": (1.5,)},
        {"inputs": (1.0,)},
        {"exact_tokens": 0},
        {"exact_tokens": 1.5},
        {"ridge": -1.0},
        {"rank": float("nan")},
        {"distill_weight": 1.5},
        {"answer_share": 0.6},
        {"z_weight": True},
    ],
)
def test_a_bad_setting_is_named(settings):
    with pytest.raises(SettingError, match=f"kv_prediction.{next(iter(settings))}"):
        KVPrediction(**settings)


def test_a_depth_that_leaves_nothing_to_predict_is_refused():
    with pytest.raises(SettingError, match=r"kv_prediction.depths=2: must be below the model's 2 layers"):
        Adapted(tiny_model(), KVPrediction(depths=(2,)))


def test_shares_become_layers_and_layers_stay():
    assert KVPrediction().layer_counts(30) == [25, 20, 15, 12]
    assert KVPrediction(depths=(7, 0.5)).layer_counts(30) == [15, 7]
    assert KVPrediction().read_layers(15) == [0, 5, 10, 15]
    assert KVPrediction().previous_layers(15) == [0, 15]


def test_a_model_that_has_it_is_refused_until_it_is_detached():
    adapted = given()
    with pytest.raises(SettingError, match="attached already"):
        Adapted(adapted.model, KVPrediction(depths=(1,)))
    Adapted(adapted.detach(), KVPrediction(depths=(1,)))


def test_maps_of_another_geometry_or_other_depths_are_refused():
    tensors = given().method.state(given().model)
    other = Adapted(tiny_model("llama", layers=4), KVPrediction(depths=(1, 2)))
    with pytest.raises(SettingError, match="of no depth of this method"):
        other.method.load_state(other.model, tensors)
    other = Adapted(tiny_model("llama", layers=4), KVPrediction(depths=(1, 2, 3), rank=0.5))
    with pytest.raises(SettingError, match="another geometry"):
        other.method.load_state(other.model, tensors)
    with pytest.raises(SettingError, match="is missing"):
        other.method.load_state(other.model, {})


def test_an_artifact_brings_prompts_back_and_is_a_plain_model_beside_it(tmp_path, tiny_tokenizer):
    adapted = given(family="qwen3")
    ids = tiny_windows(1, 16)
    folder = save(adapted, tiny_tokenizer, tmp_path / "saved")
    assert not any("kv_predictors" in name for name in families.plain_state_dict(adapted.model))
    again, _ = load(folder)
    assert again.method == adapted.method
    assert again.dial == adapted.dial
    for compute in adapted.dial.compute:
        with spend({"prefill": compute}):
            mine = adapted.generate(ids, max_new_tokens=4, do_sample=False)
            assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), mine)


def test_settings_survive_plain_types():
    method = KVPrediction(depths=(3, 0.5), rank=0, exact_tokens=4)
    assert make_method(method.to_dict()) == method


def test_the_cost_falls_with_depth_and_counts_the_maps():
    method = KVPrediction(rank=0, inputs=(), previous=())
    shares = [method._share(SMOLLM2, depth) for depth in (25, 20, 15, 12)]
    assert shares == sorted(shares, reverse=True)
    layer = SMOLLM2.attention_weights + SMOLLM2.ffn_weights
    assert shares[2] == pytest.approx((15 * layer + 15 * 576 * 384) / (30 * layer))
    long = method.cost(SMOLLM2, compute=shares[2], num_tokens=1001).flops
    assert long.auxiliary == 2 * 1000 * (15 * layer + 15 * 576 * 384)
    assert long.head == 2 * SMOLLM2.head_weights


def test_a_model_of_one_layer_is_refused():
    with pytest.raises(SettingError, match="at least 2 layers"):
        KVPrediction().check(tiny_model(layers=1))
