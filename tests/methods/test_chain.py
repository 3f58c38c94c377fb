"""Several methods as one: who answers what, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.errors import SettingError
from rheostat.methods import Chain, DynaMoE, Method, QuantSpec, make_method
from tests.tiny import SMOLLM2, tiny_model, tiny_windows

CALLS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Noted(Method):
    """Writes down what it is asked."""

    name: ClassVar[str] = "noted"
    stages: ClassVar[frozenset[str]] = frozenset({"prefill", "cache"})
    fails: bool = False

    def attach(self, model):
        CALLS.append(f"attach {self.name}")
        if self.fails:
            raise SettingError("no")

    def detach(self, model):
        CALLS.append(f"detach {self.name}")

    def make_cache(self, model):
        CALLS.append(f"cache {self.name}")
        return super().make_cache(model)

    def prefill(self, model, *args):
        CALLS.append(f"prefill {self.name}")
        return super().prefill(model, *args)

    def state(self, model):
        return {"x": torch.ones(1)}

    def load_state(self, model, tensors):
        CALLS.append(f"load {sorted(tensors)}")

    def baselines(self, model, expert_counts, seed):
        return {f"{self.name} at random": lambda layer, x: x}


@dataclass(frozen=True, kw_only=True)
class Other(Noted):
    """A second one, elsewhere."""

    name: ClassVar[str] = "other"
    stages: ClassVar[frozenset[str]] = frozenset({"decode"})

    def decode(self, model, *args):
        CALLS.append(f"decode {self.name}")
        return super().decode(model, *args)


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def test_attach_in_order_and_detach_in_reverse():
    Adapted(tiny_model(), Chain([Noted(), Other()])).detach()
    assert CALLS == ["attach noted", "attach other", "detach other", "detach noted"]


def test_a_failure_takes_off_what_was_attached():
    with pytest.raises(SettingError, match="no"):
        Adapted(tiny_model(), Chain([Noted(), Other(fails=True)]))
    assert CALLS == ["attach noted", "attach other", "detach noted"]


def test_each_touchpoint_is_answered_at_its_stage():
    chain, model = Chain([Noted(), Other()]), tiny_model()
    ids = tiny_windows(1, 5)
    with torch.no_grad():
        cache = chain.make_cache(model)
        chain.prefill(model, ids[:, :4], torch.ones(1, 4), cache)
        last = chain.decode(model, ids[:, 4:], torch.ones(1, 5), cache)
        torch.testing.assert_close(last, model(input_ids=ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert CALLS == ["cache noted", "prefill noted", "decode other"]
    assert type(chain.at("width")) is Method


def test_tensors_go_to_their_own_method():
    chain, model = Chain([Noted(), Other()]), tiny_model()
    assert set(chain.state(model)) == {"noted/x", "other/x"}
    chain.load_state(model, {"noted/a": torch.ones(1), "other/b": torch.ones(1)})
    assert CALLS == ["load ['a']", "load ['b']"]
    with pytest.raises(SettingError, match="tensor nobody/x belongs to no method of this chain"):
        chain.load_state(model, {"nobody/x": torch.ones(1)})


def test_what_any_wants_the_chain_wants():
    assert Chain([Noted(), DynaMoE()]).wants_teacher()
    assert not Chain([Noted(), DynaMoE(trained="routers")]).wants_teacher()
    assert [m.name for m in Chain([Noted(), DynaMoE()]).dialled()] == ["dynamoe"]
    assert set(Chain([Noted(), Other()]).baselines(tiny_model(), {}, 0)) == {"noted at random", "other at random"}


def test_an_empty_chain_is_the_plain_model():
    adapted = Adapted(tiny_model(), Chain())
    ids = tiny_windows(1)
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
    assert adapted.method.floor(adapted.geometry) == 1.0
    assert set(adapted.method.loss(adapted.model, {"input_ids": ids})[1]) == {"dense.lm"}


def test_cost_and_floor_are_those_of_the_one_with_a_dial():
    chain, one = Chain([Noted(), DynaMoE(tile=4)]), DynaMoE(tile=4)
    geometry = Adapted(tiny_model()).geometry
    assert chain.floor(geometry) == one.floor(geometry)
    assert chain.cost(geometry, compute=0.9, num_tokens=3) == one.cost(geometry, compute=0.9, num_tokens=3)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([DynaMoE(), DynaMoE()], "dynamoe and dynamoe both act at the stage width"),
        ([Method(), Method()], "chain.methods='dense': must be named once"),
        ([Chain()], "must be a list of methods, none of them a chain"),
        (["dynamoe"], "chain.methods='dynamoe'"),
    ],
)
def test_what_does_not_compose_is_refused(methods, message):
    with pytest.raises(SettingError, match=message):
        Chain(methods)


def test_settings_survive_plain_types():
    chain = Chain([Method(), DynaMoE(num_experts=3)])
    assert make_method(chain.to_dict()) == chain
    with pytest.raises(SettingError, match="chain.nonsense=1: must be one of the settings"):
        make_method(chain.to_dict() | {"nonsense": 1})


def test_what_says_nothing_of_training_leaves_it_to_the_others():
    chain, one = Chain([DynaMoE(tile=4, trained="routers"), Noted()]), DynaMoE(tile=4, trained="routers")
    adapted = Adapted(tiny_model(), chain)
    assert chain.trainable(adapted.model) == one.trainable(adapted.model)
    assert all(".router." in name for name in chain.trainable(adapted.model))
    _, parts = chain.loss(adapted.model, {"input_ids": tiny_windows(1)})
    assert {name.partition(".")[0] for name in parts} == {"dynamoe"}
    plain = Chain([Noted()])
    assert plain.trainable(tiny_model()) == Method().trainable(tiny_model())


def test_a_cache_saves_as_much_in_a_chain_as_alone():
    cache = QuantSpec()
    about = {"num_tokens": 1, "past": 4096}
    assert Chain([cache]).cost(SMOLLM2, **about) == cache.cost(SMOLLM2, **about)
    saved = Method().cost(SMOLLM2, **about).bytes.total - cache.cost(SMOLLM2, **about).bytes.total
    alone = DynaMoE().cost(SMOLLM2, compute=0.8, **about)
    both = Chain([DynaMoE(), cache]).cost(SMOLLM2, compute=0.8, **about)
    assert alone.bytes.total - both.bytes.total == saved > 0
    assert both.flops == alone.flops
