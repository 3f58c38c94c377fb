"""Training: what changes, what does not, and that an interruption costs nothing but time."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.spending import current_spending, spend
from rheostat.train.settings import TrainSettings
from rheostat.train.trainer import train
from tests.tiny import tiny_adapted, tiny_windows
from tests.train.runs import SETTINGS, TEACHER, changed, run, weights


@torch.no_grad()
def divergence(adapted: Adapted, compute: float) -> float:
    """From the dense model, at a dial, on the training text."""
    ids = tiny_windows(16)
    with spend(compute):
        mine = adapted(input_ids=ids).logits.log_softmax(-1)
    theirs = TEACHER(input_ids=ids).logits.log_softmax(-1)
    return float((theirs.exp() * (theirs - mine)).sum(-1).mean())


def test_a_few_steps_bring_the_slices_closer_to_the_dense_model(tmp_path):
    adapted = tiny_adapted(refit=False, ranking="activation")
    before = divergence(adapted, adapted.dial.low)
    frozen = adapted.model.model.embed_tokens.weight.clone()
    facts = run(adapted, tmp_path, tokens=40 * 4 * 32, learning_rate=3e-3)
    assert facts["steps"] == 40
    assert divergence(adapted, adapted.dial.low) < 0.8 * before
    assert facts["log"][-1]["distill"] < facts["log"][0]["distill"]
    assert torch.equal(adapted.model.model.embed_tokens.weight, frozen)  # trained="ffn"


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_teacher_computes_in_the_precision_of_the_student(tmp_path, bf16, dtype):
    teacher, seen = copy.deepcopy(TEACHER), set()
    teacher.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, given, made: seen.add(made.dtype))
    settings = dataclasses.replace(SETTINGS, tokens=1, bf16=bf16)
    train(tiny_adapted(), tiny_windows(16), settings, output_dir=tmp_path, teacher=teacher)
    assert seen == {dtype}


def test_training_leaves_the_model_as_a_model(tmp_path):
    adapted = tiny_adapted()
    config = adapted.config.to_dict()
    wanted = {name: p.requires_grad for name, p in adapted.model.named_parameters()}
    run(adapted, tmp_path, bf16=True, gradient_checkpointing=True)
    assert not adapted.model.training
    assert adapted.config.to_dict() == config  # the Trainer would leave the cache off
    assert "forward" not in adapted.model.__dict__  # nor may mixed precision stay on
    assert not adapted.model.is_activation_checkpointing
    assert {name: p.requires_grad for name, p in adapted.model.named_parameters()} == wanted
    assert all(p.grad is None for p in adapted.parameters())
    assert current_spending() is None
    assert adapted(input_ids=tiny_windows(1)).logits.dtype == torch.float32


def test_a_frozen_backbone_stays_to_the_last_bit(tmp_path):
    adapted = tiny_adapted(trained="routers", router_loss_share=0.1)  # which then does not count
    before = weights(adapted)
    run(adapted, tmp_path)
    moved = changed(before, weights(adapted))
    assert moved
    assert all(".mlp.router." in key for key in moved)


def test_everything_trains_when_asked(tmp_path):
    adapted = tiny_adapted(trained="all")
    before = weights(adapted)
    run(adapted, tmp_path)
    moved = changed(before, weights(adapted))
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"} <= moved


def test_routers_have_a_learning_rate_of_their_own(tmp_path):
    def moved(part: str, **rates: float) -> float:
        adapted = tiny_adapted()
        before = weights(adapted)
        run(adapted, tmp_path / f"{part}{rates}", tokens=4 * 32, warmup_share=0, **rates)
        after = weights(adapted)
        return max(float((after[key] - before[key]).abs().max()) for key in before if part in key)

    assert moved(".router.", learning_rate=1e-12, router_learning_rate=1e-2) == pytest.approx(1e-2, rel=0.05)
    assert moved("host.up_proj", learning_rate=1e-3, router_learning_rate=1e-12) == pytest.approx(1e-3, rel=0.05)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Recomputation runs after the block that set the dials, and must see them all the same."""
    results = []
    for checkpointing in (False, True):
        adapted = tiny_adapted()
        run(adapted, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        results.append(weights(adapted))
    assert not changed(*results)


def test_tokens_are_those_that_were_seen(tmp_path):
    """A text shorter than a batch fills no batch."""
    settings = TrainSettings(tokens=2 * 4 * 32, length=32, batch_size=4)
    facts = train(tiny_adapted(), tiny_windows(3, 32), settings, output_dir=tmp_path)
    assert (facts["steps"], facts["tokens"]) == (2, 2 * 3 * 32)


def test_accumulated_steps_are_means(tmp_path):
    adapted = tiny_adapted()
    facts = run(adapted, tmp_path, tokens=2 * 4 * 32, batch_size=2, accumulate=2)
    assert (facts["steps"], facts["tokens"]) == (2, 2 * 4 * 32)
    for entry in facts["log"]:  # the parts are means over the passes; so must their sum be
        assert entry["loss"] == pytest.approx(entry["distill"] + entry["router"], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"accumulate": 2, "batch_size": 2}], ids=str)
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, settings):
    whole = tiny_adapted()
    run(whole, tmp_path / "whole", **settings)

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_adapted(), folder, save_minutes=1e-9, progress=interrupt, **settings)
    # A checkpoint whose writing was cut off is not the one to resume from.
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"cut")
    seen = []
    resumed = tiny_adapted()
    run(resumed, folder, progress=lambda what, done, total: seen.append((done, total)), **settings)
    assert seen == [(4, 6), (5, 6), (6, 6)]
    assert not changed(weights(whole), weights(resumed))


def test_what_training_outruns_is_solved_anew_in_between(tmp_path):
    done, steps = [], []
    settings = dataclasses.replace(SETTINGS, settles=3)
    train(
        tiny_adapted(),
        tiny_windows(16),
        settings,
        output_dir=tmp_path,
        settle=lambda: steps.append(done[-1]),
        progress=lambda what, step, total: done.append(step),
    )
    assert done[-1] == 6
    assert steps == [2, 4]


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    adapted = tiny_adapted()
    with torch.no_grad():
        adapted.model.model.layers[0].mlp.router.outer.bias.fill_(float("nan"))
    with pytest.raises(SettingError, match=r"train.learning_rate=0.001: the loss is nan, must be finite; lower it"):
        run(adapted, tmp_path)
    assert not adapted.model.training


def test_divergence_is_told(tmp_path):
    adapted = tiny_adapted()
    with pytest.raises(SettingError, match=r"train.learning_rate=1e\+30: the loss is nan, must be finite; lower it"):
        run(adapted, tmp_path, learning_rate=1e30, warmup_share=0)


def test_half_precision_that_cannot_be_trained_is_refused(tmp_path):
    adapted = tiny_adapted()
    adapted.half()
    with pytest.raises(SettingError, match="dtype='float16': must be float32 or bfloat16 for training"):
        run(adapted, tmp_path)


def test_rows_draw_their_dials_from_the_reach(tmp_path, monkeypatch):
    adapted = tiny_adapted()
    drawn = []
    loss = type(adapted.method).loss

    def watch(self, *args, **kwargs):
        drawn.append(current_spending().prefill)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(type(adapted.method), "loss", watch)
    run(adapted, tmp_path / "a", low=0.01, high=0.9)
    values = [value for row in drawn for value in row]
    assert len(values) == 6 * 4
    assert len(set(values)) == 6 * 4
    assert adapted.dial.low - 1e-6 <= min(values) < max(values) <= 0.9
    drawn.clear()
    run(adapted, tmp_path / "b", low=0.01, high=0.02)  # all below the reach
    assert [value for row in drawn for value in row] == pytest.approx([adapted.dial.low] * 24)
