"""Several methods on one dial: the path, and what it is measured by."""

from __future__ import annotations

import itertools

import pytest
import torch

from rheostat import joint
from rheostat.adapted import Adapted
from rheostat.calibration import calibrate
from rheostat.dial import Dial
from rheostat.methods import Chain, DynaMoE, KVPrediction, Method
from tests.tiny import tiny_model, tiny_windows


@pytest.fixture(scope="module")
def chained() -> Adapted:
    chain = Chain([KVPrediction(depths=(1, 2, 3)), DynaMoE(tile=4, router_steps=5)])
    adapted = Adapted(tiny_model(layers=4), chain)
    chain.fit(adapted.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    adapted.dial = calibrate(adapted, tiny_windows(seed=1))
    return adapted


def test_a_divergence_is_that_of_the_whole_vocabulary_while_all_words_are_told_apart():
    dense, other = torch.randn(2, 2, 3, 40, generator=torch.Generator().manual_seed(0)).mul(3)
    expected = (dense.softmax(-1) * (dense.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
    words = joint.Words.of(dense)
    assert words.ids.shape == (2, 3, 40)
    assert torch.allclose(words.divergence(other), expected, atol=1e-5)
    assert words.divergence(dense).abs().max() < 1e-6


def test_words_put_together_only_lessen_it(monkeypatch):
    dense, other = torch.randn(2, 2, 3, 40, generator=torch.Generator().manual_seed(0)).mul(2)
    whole = joint.Words.of(dense).divergence(other)
    monkeypatch.setattr(joint, "MOST_WORDS", 7)
    words = joint.Words.of(dense)
    assert words.ids.shape == (2, 3, 7)
    part = words.divergence(other)
    assert (part < whole).all()
    assert (part > 0.3 * whole).all()


def test_a_path_turns_one_method_at_a_time_and_never_back(chained):
    depth, price = chained.dial.settings["kv_prediction"], chained.dial.settings["dynamoe"]
    assert depth[0] == price[0] == 0.0
    assert depth[-1] == 3.0
    assert len(depth) > 4
    for (a, b), (c, d) in itertools.pairwise(zip(depth, price, strict=True)):
        assert c >= a
        assert d >= b
        assert (c, d) != (a, b)


def test_the_table_says_what_prompts_and_answers_spend_and_how_far_they_are_from_the_dense_model(chained):
    windows, dial = tiny_windows(seed=1), chained.dial
    answers = joint.Answers(chained, windows)
    assert dial.measured_on["prompt_share"] == joint.PROMPT_SHARE
    assert dial.measured_on["divergence"][0] == 0.0
    for point in (1, len(dial.compute) // 2, -1):
        native = {name: values[point] for name, values in dial.settings.items()}
        spent, apart = answers.measure(native)
        assert spent == pytest.approx(dial.compute[point])
        assert apart == pytest.approx(dial.measured_on["divergence"][point], abs=1e-4)
        assert apart > 0


def test_each_turn_is_the_cheaper_one(chained):
    """The first turn of the path is compared with the other one there was."""
    answers, dial = joint.Answers(chained, tiny_windows(seed=1)), chained.dial
    taken = {name: values[1] for name, values in dial.settings.items()}
    turned = next(name for name, value in taken.items() if value > 0)
    other = next(name for name in taken if name != turned)
    first_of_other = {"kv_prediction": 1.0, "dynamoe": min(v for v in dial.settings["dynamoe"] if v > 0)}[other]

    def price(native):
        spent, apart = answers.measure(native)
        return apart / (1 - spent)

    assert price(taken) <= price({turned: 0.0, other: first_of_other})


def test_settings_are_chosen_at_even_steps_of_compute():
    own = Dial(compute=(1.0, 0.99, 0.98, 0.9, 0.79, 0.7, 0.62, 0.5), settings={"it": (0, 1, 2, 3, 4, 5, 6, 7)})
    assert joint.levels_of(own, "it") == (0, 3, 4, 5, 6, 7)
    assert joint.levels_of(Dial(compute=(1.0, 0.5), settings={"it": (0, 1)}), "it") == (0, 1)


def test_nothing_is_measured_twice(chained, monkeypatch):
    asked = []
    measured = joint.read_and_answer

    def reading(adapted, windows):
        from rheostat.spending import current_spending

        asked.append((current_spending().native, len(windows)))
        return measured(adapted, windows)

    monkeypatch.setattr(joint, "read_and_answer", reading)
    levels = [(0.0, 1.0, 2.0), (0.0, 0.1)]
    answers = joint.Answers(chained, tiny_windows(3, seed=2))
    dial = joint.walk(answers, chained.method.dialled(), levels)
    joint.walk(answers, chained.method.dialled()[:1], levels[:1])
    settings = [tuple(sorted((native or {}).items())) for native, _ in asked]
    assert len(settings) == len(set(settings))
    assert settings.count(()) == 1
    assert len(dial.compute) == 4


class Halves(Method):
    """A method at another stage, with two settings that change nothing: free to turn, and not worth it."""

    name = "halves"
    stages = frozenset({"decode"})

    def setting_range(self):
        return (0.0, 2.0)

    def steps(self, geometry):
        return (1.0, 2.0)


def test_a_setting_that_saves_nothing_is_turned_last_and_left_out():
    adapted = Adapted(tiny_model(), Method())
    adapted.method = Chain([Halves(), DynaMoE(tile=4)])
    adapted.method.methods[1].attach(adapted.model)
    adapted.method.fit(adapted.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    dial = calibrate(adapted, tiny_windows(seed=1))
    assert set(dial.settings["halves"]) == {0.0}
    assert dial.settings["dynamoe"][-1] > 0
