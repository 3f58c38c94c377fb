"""Training: gradients through the frozen model to the maps, and the parts of the loss."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.methods.base import Method
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.methods.kv_prediction.predictor import predictors
from rheostat.methods.kv_prediction.training import consistency, draw_answers, predicting
from rheostat.methods.kv_prediction.watching import recording
from rheostat.spending import spend
from rheostat.train.settings import TrainSettings
from rheostat.train.trainer import train
from tests.methods.kv_prediction.given import exact, given
from tests.tiny import CONTRACT_FAMILIES, tiny_model, tiny_windows

OWN = {"auxiliary": "pruned", "kept": (0, 2)}
"""An auxiliary that is a model of its own; its maps are at depth 0."""


def parallel(adapted, depth, ids):
    """Logits of the parallel form."""
    is_first = torch.zeros_like(ids, dtype=torch.bool)
    is_first[:, 0] = True
    maps = predictors(adapted.model)[depth]
    made = None if depth else maps.run(ids, None, None)[1]
    with predicting(adapted.model, maps, is_first, made):
        return adapted.model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
def test_exact_maps_make_the_parallel_form_dense_and_the_consistency_zero(family):
    adapted = exact(family, 5)
    ids = tiny_windows(3)
    ids[:, 0] = 5
    with torch.no_grad():
        torch.testing.assert_close(parallel(adapted, 1, ids), tiny_model(family)(ids).logits, rtol=1e-4, atol=1e-4)
        _, parts = adapted.method.loss(adapted.model, {"input_ids": ids})
        _, dense = Method().loss(tiny_model(family), {"input_ids": ids})
    assert parts["consistency"] < 1e-5
    assert parts["lm"] == pytest.approx(dense["lm"], rel=1e-4)


@pytest.mark.parametrize(("settings", "depth"), [({}, 2), (OWN, 0)])
def test_the_parallel_form_is_causal(settings, depth):
    adapted = given(**settings)
    ids = tiny_windows(1, 20)
    other = ids.clone()
    other[0, 12:] = 9
    with torch.no_grad():
        one, two = parallel(adapted, depth, ids), parallel(adapted, depth, other)
    torch.testing.assert_close(one[:, :12], two[:, :12])
    assert not torch.allclose(one[:, 12:], two[:, 12:])


@pytest.mark.parametrize("settings", [{"depths": (2,)}, OWN])
def test_padding_changes_no_part_of_the_loss(settings):
    adapted = given(**settings)
    ids = tiny_windows(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    other = ids.clone()
    other[1, 16:] = 7
    with torch.no_grad():
        one = adapted.method.loss(adapted.model, {"input_ids": ids, "attention_mask": mask})[1]
        two = adapted.method.loss(adapted.model, {"input_ids": other, "attention_mask": mask})[1]
    assert one == pytest.approx(two)


def test_consistency_is_a_mean_over_layers_of_two_mean_distances():
    adapted = given(depths=(2,))
    ids = tiny_windows(2)
    predictor = predictors(adapted.model)[2]
    with torch.no_grad(), recording(adapted.model, 2) as seen:
        adapted.model(ids)
    moved = {place: tensor + (0.5 if place[0] == "keys" else 0.25) for place, tensor in seen.items()}
    keep = torch.ones_like(ids, dtype=torch.bool)
    assert float(consistency(adapted.model, predictor, moved, seen, keep)) == pytest.approx(0.75, rel=1e-5)


@pytest.mark.parametrize("settings", [{"depths": (1, 2)}, OWN])
def test_a_step_changes_the_maps_and_leaves_the_model_bit_identical(tmp_path, settings):
    adapted = given(**settings, consistency_weight=0.0)
    before = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    settings = TrainSettings(tokens=4 * 32 * 4, length=32, batch_size=4, learning_rate=1e-3)
    facts = train(adapted, tiny_windows(16), settings, output_dir=tmp_path)
    assert facts["steps"] == 4
    changed = {name for name, value in adapted.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".kv_predictors." in name for name in changed)
    if settings is OWN:  # it learns, and so do its maps
        assert {".auxiliary." in name for name in changed} == {True, False}


@pytest.mark.slow
def test_consistency_helps_and_trained_maps_beat_their_own_auxiliary_alone():
    """From random maps and on the same text, the paper's order."""
    windows, unseen = tiny_windows(16), tiny_windows(8, seed=7)
    dense = tiny_model(layers=4)
    with torch.no_grad():
        wanted = dense(unseen).logits.log_softmax(-1)

    def distance(logits):
        return float((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)[:, 1:].mean())

    left = {}
    for weight in (0.0, 1.0):
        adapted = Adapted(tiny_model(layers=4), KVPrediction(**OWN, consistency_weight=weight, distill_weight=1.0))
        maps = predictors(adapted.model)[0]
        learned = set(adapted.method.trainable(adapted.model))
        weights = [one for name, one in adapted.model.named_parameters() if name in learned]
        optimizer = torch.optim.AdamW(weights, lr=3e-3)
        for _ in range(60):
            loss, _ = adapted.method.loss(adapted.model, {"input_ids": windows})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            left[weight] = distance(parallel(adapted, 0, unseen))
            alone = distance(maps.logits(maps.run(unseen, None, None)[0]))
    assert left[1.0] < 0.92 * left[0.0]
    assert left[1.0] < 0.25 * alone


def test_training_lowers_the_loss():
    adapted = given(depths=(1,), ridge=1.0, inputs=())
    windows = tiny_windows(8)
    model = adapted.model
    maps = [p for name, p in model.named_parameters() if name in set(adapted.method.trainable(model))]
    optimizer = torch.optim.AdamW(maps, lr=3e-3)
    losses = []
    for _ in range(20):
        loss, _ = adapted.method.loss(model, {"input_ids": windows})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("num_exact", [1, 3])
def test_answers_are_read_in_training_as_they_are_in_use(num_exact):
    adapted = given(depths=(2,), exact_tokens=num_exact)
    ids, length = tiny_windows(2, 24), 16
    mask = torch.ones_like(ids)
    is_answer = torch.arange(24).expand(2, -1) >= length - num_exact
    is_first = torch.arange(24).expand(2, -1) == 0
    one = predictors(adapted.model)[2]
    with torch.no_grad(), predicting(adapted.model, one, is_first, is_answer=is_answer):
        trained = adapted.model(ids, use_cache=False).logits[:, length - 1 :]
    cache = adapted.method.make_cache(adapted.model)
    with spend({"prefill": adapted.dial.low}), torch.no_grad():
        used = [adapted.method.prefill(adapted.model, ids[:, :length], mask[:, :length], cache)]
        for t in range(length, 24):
            used.append(adapted.method.decode(adapted.model, ids[:, t : t + 1], mask[:, : t + 1], cache))
    torch.testing.assert_close(trained, torch.stack(used, 1), rtol=1e-4, atol=1e-4)


def test_answers_are_drawn_at_the_ends_of_rows_and_of_the_mean_length_asked_for():
    keep = torch.ones(400, 32, dtype=torch.bool)
    keep[:, 24:] = False
    drawn = draw_answers(keep, 0.25)
    assert not drawn[:, 24:].any()
    assert not (drawn[:, :-9] & ~drawn[:, 1:-8]).any()  # once begun, they last to the row's end
    assert drawn[:, 12:24].float().mean() == pytest.approx(0.5, abs=0.05)
    assert not drawn[:, :12].any()


def test_answers_change_the_loss_and_none_are_read_by_default():
    adapted, other = given(depths=(2,)), given(depths=(2,), answer_share=0.5)
    batch = {"input_ids": tiny_windows(2, 24)}
    with torch.no_grad():
        plain = adapted.method.loss(adapted.model, batch)[1]["lm"]
        mixed = other.method.loss(other.model, batch)[1]["lm"]
    assert plain != pytest.approx(mixed, rel=1e-6)
