"""The one path from a dense model to an adapted one: same seed, same model; interrupted, it goes on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rheostat.adaptation import FitSettings, adapt
from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.methods import Chain, DynaMoE, Method
from rheostat.methods.dynamoe import fitting
from rheostat.methods.dynamoe.method import nested_ffns
from rheostat.spending import spend
from rheostat.train.settings import TrainSettings

METHOD = DynaMoE(tile=4, router_width=8, router_steps=20)
FIT = FitSettings(windows=8, length=32, dial_windows=6)
TRAIN = TrainSettings(tokens=6 * 2 * 32, length=32, batch_size=2, learning_rate=1e-3, save_minutes=1e-9)
TEXT = [f"The river number {n} runs to the sea; nobody counts its {n * n} stones." for n in range(40)]
HELD = [f"Somebody wrote {n} letters in {n + 2} winters, and sent none." for n in range(40)]


@pytest.fixture
def model(tiny_model_folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()


@pytest.fixture(scope="module")
def whole(tiny_model_folder, tiny_tokenizer) -> Callable[..., Adapted]:
    """Runs that nothing interrupted, by their training: each is made once. Tests must not change them."""

    @functools.cache
    def made(train: TrainSettings | None = None) -> Adapted:
        dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
        return adapted_on(dense, tiny_tokenizer, train=train)

    return made


def adapted_on(model: PreTrainedModel, tokenizer, **settings) -> Adapted:
    return adapt(model, tokenizer, METHOD, TEXT, **{"held_out": HELD, "fit": FIT} | settings)


def tensors(adapted: Adapted) -> dict[str, torch.Tensor]:
    return adapted.method.state(adapted.model) | adapted.model.state_dict()


def equal(a: Adapted, b: Adapted) -> bool:
    mine, theirs = tensors(a), tensors(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def stop_at(wanted: str, count: int = 1):
    """A progress that interrupts as Ctrl-C does, the n-th time something is done."""
    seen = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append(what)
        if seen.count(wanted) == count and what == wanted:
            raise KeyboardInterrupt

    return progress


def test_text_becomes_a_dial(model, tiny_tokenizer):
    told = []
    adapted = adapted_on(model, tiny_tokenizer, seed=3, progress=lambda *call: told.append(call))
    assert adapted.model is model
    assert adapted.dial.low < 0.75
    with spend(adapted.dial.low) as meter, torch.no_grad():
        adapted(**tiny_tokenizer(HELD[:1], return_tensors="pt"))
    assert meter.compute < 0.85
    assert {what for what, _, _ in told} == {"watching the dense model", "solving layers", "measuring the dial"}
    report = json.loads(json.dumps(adapted.report))
    assert report["provenance"]["seed"] == 3
    assert report["provenance"]["base_digest"] == report["base_digest"]
    assert report["fit"] == {"windows": 8, "length": 32, "dial_windows": 6}
    assert report["fitted"]["num_tokens"] == 8 * 32
    assert report["held_out"] == "text"  # not the documents themselves
    assert "trained" not in report
    assert report["base"] == {"name": "model"}  # the folder's last part


def test_a_file_may_hold_the_text(model, tiny_tokenizer, tiny_text):
    adapted = adapt(model, tiny_tokenizer, METHOD, tiny_text, held_out=str(tiny_text), fit=FIT)
    assert adapted.dial.low < 0.75
    assert adapted.report["held_out"] == str(tiny_text)


def test_the_same_seed_gives_the_same_model(model, tiny_tokenizer, whole):
    first, again, other = (
        whole(TRAIN),
        *(adapted_on(copy.deepcopy(model), tiny_tokenizer, seed=seed, train=TRAIN) for seed in (0, 1)),
    )
    assert equal(first, again)
    assert first.dial == again.dial
    assert not equal(first, other)


def test_the_plain_model_is_adapted_too(model, tiny_tokenizer):
    """The baseline that is given the same training."""
    before = copy.deepcopy(model.state_dict())
    adapted = adapt(model, tiny_tokenizer, Method(), TEXT, held_out=HELD, fit=FIT)
    assert adapted.dial.low == 1.0
    assert all(torch.equal(adapted.model.state_dict()[key], before[key]) for key in before)


def test_an_interrupted_fit_is_resumed(model, tiny_tokenizer, tmp_path, monkeypatch, caplog, whole):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        adapted_on(model, tiny_tokenizer, work_dir=tmp_path, progress=stop_at("measuring the dial"))
    # The model is handed back as it was, so that the same call can be made again.
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("fitted again")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(DynaMoE, "fit", fail)
        resumed = adapted_on(model, tiny_tokenizer, work_dir=tmp_path)
    assert "resuming after the fit" in caplog.text
    assert equal(resumed, whole())
    assert resumed.dial == whole().dial
    assert resumed.report["fitted"] == whole().report["fitted"]


def test_a_fit_goes_on_with_the_next_layer(model, tiny_tokenizer, tmp_path, monkeypatch, whole):
    wanted = whole()
    with pytest.raises(KeyboardInterrupt):
        adapted_on(model, tiny_tokenizer, work_dir=tmp_path, progress=stop_at("solving layers", 2))
    assert not nested_ffns(model)
    assert [file.name for file in tmp_path.glob("*/*")] == ["layer-000.safetensors"]

    solved = []
    monkeypatch.setattr(fitting, "_solve", lambda *args, solve=fitting._solve: solved.append(args) or solve(*args))
    resumed = adapted_on(model, tiny_tokenizer, work_dir=tmp_path)
    assert len(solved) == len(nested_ffns(model)) - 1
    assert equal(resumed, wanted)
    assert resumed.report["fitted"] == wanted.report["fitted"]
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]


def test_a_damaged_layer_is_solved_again(model, tiny_tokenizer, tmp_path, caplog, whole):
    with pytest.raises(KeyboardInterrupt):
        adapted_on(model, tiny_tokenizer, work_dir=tmp_path, progress=stop_at("solving layers", 2))
    next(tmp_path.glob("*/layer-000.safetensors")).write_bytes(b"damaged")
    resumed = adapted_on(model, tiny_tokenizer, work_dir=tmp_path)
    assert "solving the layer again" in caplog.text
    assert equal(resumed, whole())


@pytest.mark.parametrize("change", [{"seed": 1}, {"fit": FitSettings(windows=7, length=32)}, {"text": TEXT[:20]}, {}])
def test_what_was_kept_is_used_only_for_the_same_settings(model, tiny_tokenizer, tmp_path, caplog, change):
    adapted_on(copy.deepcopy(model), tiny_tokenizer, work_dir=tmp_path)
    text = change.pop("text", TEXT)
    settings = {"held_out": HELD, "fit": FIT, "work_dir": tmp_path} | change
    with caplog.at_level(logging.INFO):
        again = adapt(copy.deepcopy(model), tiny_tokenizer, METHOD, text, **settings)
    same = not change and text is TEXT
    assert ("resuming after the fit" in caplog.text) == same
    fresh = adapt(model, tiny_tokenizer, METHOD, text, **{k: v for k, v in settings.items() if k != "work_dir"})
    assert equal(again, fresh)


def test_a_damaged_leftover_is_fitted_again(model, tiny_tokenizer, tmp_path, caplog, whole):
    (tmp_path / "fit.safetensors").write_bytes(b"damaged")
    adapted = adapted_on(model, tiny_tokenizer, work_dir=tmp_path)
    assert "cannot be read" in caplog.text
    assert equal(adapted, whole())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_interrupted_training_is_resumed_to_the_same_weights(model, tiny_tokenizer, tmp_path, lora_rank, whole):
    train = dataclasses.replace(TRAIN, lora_rank=lora_rank)
    with pytest.raises(KeyboardInterrupt):
        adapted_on(
            copy.deepcopy(model), tiny_tokenizer, train=train, work_dir=tmp_path, progress=stop_at("training", 4)
        )
    (folder,) = tmp_path.glob("train-*")
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = adapted_on(model, tiny_tokenizer, train=train, work_dir=tmp_path)
    assert equal(resumed, whole(train))
    assert resumed.dial == whole(train).dial


def test_training_that_was_not_begun_starts_with_the_same_adapters(model, tiny_tokenizer, tmp_path, whole):
    train = dataclasses.replace(TRAIN, lora_rank=2)
    with pytest.raises(KeyboardInterrupt):
        adapted_on(
            copy.deepcopy(model), tiny_tokenizer, train=train, work_dir=tmp_path, progress=stop_at("training", 1)
        )
    assert not list(tmp_path.glob("train-*/checkpoint-*"))
    # The fit is not run again, so it has not drawn from the common source of randomness.
    assert equal(adapted_on(model, tiny_tokenizer, train=train, work_dir=tmp_path), whole(train))


def test_training_is_reported(whole):
    trained = json.loads(json.dumps(whole(TRAIN).report))["trained"]
    assert (trained["steps"], trained["tokens"]) == (6, 6 * 2 * 32)
    assert {"loss", "distill", "router"} <= trained["log"][-1].keys()


def test_routers_are_fitted_anew_after_training(whole):
    adapted = whole(TRAIN)
    assert len(adapted.report["settled"]["layers"]) == len(nested_ffns(adapted.model))
    assert "settled" not in whole().report


def test_a_chain_distils_as_its_methods_do(model, tiny_tokenizer):
    adapted = adapt(model, tiny_tokenizer, Chain([METHOD]), TEXT, held_out=HELD, fit=FIT, train=TRAIN)
    assert "dynamoe.distill" in adapted.report["trained"]["log"][-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ["Too short."]}, r"data='\d+ tokens': must be enough text for one window of 32 tokens"),
        ({"held_out": ["Too short."]}, "held_out='.* tokens': must be enough text for one window"),
        ({"data": ["", "  "]}, r"data=.*must be text: it is empty"),
        ({"data": Path("/nowhere.txt")}, "data='/nowhere.txt'"),
    ],
)
def test_bad_data_is_refused_and_the_model_left_alone(model, tiny_tokenizer, settings, message):
    with pytest.raises(SettingError, match=message):
        adapt(model, tiny_tokenizer, METHOD, **{"data": TEXT, "held_out": HELD, "fit": FIT} | settings)
    assert not nested_ffns(model)


def test_adapters_on_what_is_not_trained_are_refused_beforehand(model, tiny_tokenizer):
    def fail(what: str, done: int, total: int) -> None:
        raise AssertionError(f"work was done: {what}")

    method = DynaMoE(tile=4, trained="routers")
    train = TrainSettings(tokens=100, lora_rank=2)
    with pytest.raises(SettingError, match="train.lora_rank=2: must be 0: dynamoe as set trains no weights of the FFN"):
        adapt(model, tiny_tokenizer, method, TEXT, held_out=HELD, fit=FIT, train=train, progress=fail)


@pytest.mark.parametrize(("name", "value"), [("windows", 0), ("length", 7), ("dial_windows", 0)])
def test_fit_settings_name_themselves(name, value):
    with pytest.raises(SettingError, match=f"fit.{name}={value}: must be"):
        FitSettings(**{name: value})
