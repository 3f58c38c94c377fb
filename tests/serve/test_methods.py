"""Artifacts of other methods, and of several at once: served right, or refused before the server starts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.calibration import calibrate
from rheostat.errors import SettingError
from rheostat.methods import Chain, DynaMoE, KVPrediction, Method, QuantSpec
from rheostat.serve.backend import make_backend
from tests.serve.conftest import TEMPLATE, Live, Tiny, byte_model, live

WIDTH = DynaMoE(tile=4, router_width=8, router_steps=30)
METHODS: dict[str, Method] = {
    "kv_prediction": KVPrediction(depths=(1,)),
    "kv_prediction and dynamoe": Chain([KVPrediction(depths=(1,)), WIDTH]),
    "quantspec": QuantSpec(group_size=4, weight_group_size=8),
    "quantspec and dynamoe": Chain([QuantSpec(group_size=4, weight_group_size=8), WIDTH]),
}


@pytest.fixture(scope="module", params=METHODS)
def served(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> Iterator[tuple[Tiny, Live]]:
    """A model with such a method, and a server for it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    adapted = Adapted(byte_model(len(tokenizer)), METHODS[request.param])
    draws = [torch.randint(3, 259, (12, 32), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    adapted.method.fit(adapted.model, draws[0], generator=torch.Generator().manual_seed(0))
    adapted.dial = calibrate(adapted, draws[1])
    model = Tiny(adapted, tokenizer)
    with live(model) as server:
        yield model, server


def test_each_answer_is_that_of_the_method_at_its_dial(served: tuple[Tiny, Live]):
    model, server = served
    low = model.adapted.dial.low
    asks = [("rivers and bridges " * 2, 1.0), ("rivers and bridges " * 2, max(low, 0.8)), ("water", low)]
    client = server.client()
    for prompt, compute in asks:
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, temperature=0, n=2, extra_body={"compute": compute}
        )
        expected = model.offline(prompt, compute, 12)
        assert [choice.text for choice in answer.choices] == [expected, expected]
        assert answer.usage is not None
        spent = answer.usage.model_extra["compute"]["spent"]  # type: ignore[index]
        assert 0 < spent <= 1 + 1e-9 if compute == 1.0 else spent < 1
    server.wait_idle()


def test_what_our_runtime_cannot_run_is_refused_where_it_is_insisted_on(served: tuple[Tiny, Live]):
    model, server = served
    if server.engine.backend.name != "stock":
        assert make_backend(model.adapted, "native").name.startswith("native")
        return
    with pytest.raises(SettingError, match="runtime=native"):
        make_backend(model.adapted, "native")
