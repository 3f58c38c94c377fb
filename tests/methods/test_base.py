"""The plain model as a method: what every touchpoint does when nobody overrides it."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.cost import dense_cost
from rheostat.errors import SettingError
from rheostat.methods import METHODS, Method, kept_method, make_method
from rheostat.methods.base import STAGES, positions
from tests.tiny import tiny_model, tiny_windows

MODEL = tiny_model()
GEOMETRY = Adapted(tiny_model()).geometry


def test_positions_skip_padding_on_the_left():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert positions(mask.bool()).tolist() == positions(mask).tolist()


def test_prefill_then_decode_is_one_forward():
    ids = tiny_windows(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    method, cache = Method(), Method().make_cache(MODEL)
    with torch.no_grad():
        method.prefill(MODEL, ids[:, :5], mask[:, :5], cache)
        last = method.decode(MODEL, ids[:, 5:], mask, cache)
        assert cache.get_seq_length() == 6
        torch.testing.assert_close(last[0], MODEL(input_ids=ids[:1, 2:]).logits[0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[1], MODEL(input_ids=ids[1:]).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_positions_reach_the_model():
    """Rotary embeddings hardly show a shift, other models would."""
    ids, mask = tiny_windows(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    seen = []
    handle = MODEL.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    method, cache = Method(), Method().make_cache(MODEL)
    with torch.no_grad():
        method.prefill(MODEL, ids[:, :5], mask[:, :5], cache)
        method.decode(MODEL, ids[:, 5:], mask, cache)
    handle.remove()
    assert seen == [[[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]], [[3], [5]]]


def test_loss_is_the_cross_entropy_without_padding():
    ids = tiny_windows(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        loss, parts = Method().loss(MODEL, {"input_ids": ids})
        logits = MODEL(input_ids=ids).logits[:, :-1]
        by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert float(loss) == parts["lm"] == pytest.approx(float(by_hand), rel=1e-5)
        padded, _ = Method().loss(MODEL, {"input_ids": ids, "attention_mask": mask})
        logits = MODEL(input_ids=ids, attention_mask=mask).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        assert float(padded) == pytest.approx(float(each[mask[:, 1:] == 1].mean()), rel=1e-5)


def test_all_parameters_train_and_nothing_is_dialled():
    method = Method()
    assert method.trainable(MODEL) == [name for name, _ in MODEL.named_parameters()]
    assert method.dialled() == []
    assert method.floor(GEOMETRY) == 1.0
    assert method.setting_range() == (0.0, 0.0)
    assert method.neutral() == 0.0
    assert not method.wants_teacher()
    assert method.baselines(MODEL, {}, 0) == {}
    assert method.fit(MODEL, tiny_windows(), generator=torch.Generator()) == {}


def test_cost_is_the_dense_formula():
    cost = Method().cost(GEOMETRY, num_tokens=5, past=3, num_logits=2, itemsize=4)
    assert cost == dense_cost(GEOMETRY, num_tokens=5, past=3, num_logits=2, itemsize=4)
    with pytest.raises(SettingError, match=r"compute=0.9: must be between 1.000 and 1 for dense"):
        Method().cost(GEOMETRY, compute=0.9, num_tokens=1)
    with pytest.raises(SettingError, match="compute=nan"):
        Method().cost(GEOMETRY, compute=float("nan"), num_tokens=1)


def test_the_floor_that_an_error_states_is_allowed():
    method = METHODS["dynamoe"](tile=4)
    low = method.floor(GEOMETRY)
    with pytest.raises(SettingError, match="compute") as error:
        method.check_compute(GEOMETRY, low - 0.1)
    stated = float(str(error.value).split("between ")[1].split(" and")[0])
    assert low <= stated < low + 1e-3
    method.check_compute(GEOMETRY, stated)


def test_tensors_for_the_plain_model_are_refused():
    Method().load_state(MODEL, {})
    with pytest.raises(SettingError, match="dense has no tensors, the file has 1"):
        Method().load_state(MODEL, {"x": torch.zeros(1)})


@pytest.mark.parametrize("name", list(METHODS))
def test_settings_survive_plain_types(name):
    method = METHODS[name]()
    assert make_method(method.to_dict()) == method
    assert method.to_dict()["name"] == name == method.name
    assert method.stages <= set(STAGES)


def test_unknown_names_are_refused():
    with pytest.raises(SettingError, match="method='nonsense': must be one of dense, dynamoe"):
        make_method({"name": "nonsense"})
    with pytest.raises(SettingError, match="method=None"):
        make_method({})
    with pytest.raises(SettingError, match="dynamoe.nonsense=3: must be one of the settings num_experts"):
        make_method({"name": "dynamoe", "nonsense": 3})


def test_a_setting_younger_than_the_artifact_is_what_it_was_in_effect():
    now = make_method({"name": "kv_prediction"})
    assert now.previous
    kept = {key: value for key, value in now.to_dict().items() if key != "previous"}
    chain = {"name": "chain", "methods": [kept, {"name": "dynamoe"}]}
    assert kept_method(kept).previous == kept_method(chain).methods[0].previous == ()
    for spec in (now.to_dict(), make_method(chain).to_dict()):
        assert kept_method(spec).to_dict() == spec


@pytest.mark.parametrize("name", METHODS)
def test_what_came_later_is_a_setting(name):
    assert set(METHODS[name].before) <= set(METHODS[name]().to_dict())
