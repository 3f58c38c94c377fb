"""Our runtime as a side: it writes what the model writes, and its bytes are those of its weights."""

from __future__ import annotations

import pytest
import torch

from rheostat.adapted import Adapted
from rheostat.bench.native import NativeSide
from rheostat.bench.sides import SideSpec, TorchSide, make_side, once
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

IDS = tiny_windows(2, 12)


def written(side, number: int = 6) -> torch.Tensor:
    with side.session():
        state = side.prefill(IDS)
        found = [state[1]]
        for _ in range(number - 1):
            state = side.decode(state)
            found.append(state[1])
    return torch.stack(found, 1)


def test_it_writes_what_transformers_writes():
    adapted = tiny_adapted()
    side = make_side(SideSpec(kind="native", model="m", weights="fp32", compute=adapted.dial.low), adapted)
    wanted = adapted.generate(IDS, max_new_tokens=6, do_sample=False, compute=adapted.dial.low, runtime="stock")
    assert torch.equal(written(side), wanted[:, 12:])
    assert side.spec.label == f"native fp32 {adapted.dial.low:g}"
    assert set(once(side, IDS, 3)) == {"first_token", "token"}


@pytest.mark.parametrize(("weights", "share"), [("fp32", 1.0), ("bf16", 0.5)])
def test_bytes_are_those_of_the_format(weights, share):
    adapted = Adapted(tiny_model())
    native = NativeSide(SideSpec(kind="native", model="m", weights=weights), adapted).spent(IDS, 4)
    stock = TorchSide(SideSpec(kind="stock", model="m", dtype="float32"), adapted.model).spent(IDS, 4)
    assert native.decode.flops == stock.decode.flops
    assert native.prefill.flops == stock.prefill.flops
    assert native.decode.bytes.scores == share * stock.decode.bytes.scores
    packed = native.decode.bytes.ffn / stock.decode.bytes.ffn  # panels are padded to 64 inputs, this FFN reads 32
    assert share <= packed <= 2 * share
    read = native.prefill.bytes.ffn / stock.prefill.bytes.ffn  # in panels too, where prompts are read natively
    assert read in (share, packed)


def test_sides_of_one_format_share_weights():
    adapted = Adapted(tiny_model())
    spec = SideSpec(kind="native", model="m", weights="int8")
    first = make_side(spec, adapted)
    assert make_side(spec, adapted, first).runtime is first.runtime
    assert make_side(spec, adapted).runtime is not first.runtime


def test_mixed_dials():
    adapted = tiny_adapted()
    side = NativeSide(SideSpec(kind="native", model="m", weights="fp32"), adapted)
    side.compute = [1.0, adapted.dial.low]
    wanted = adapted.generate(IDS, max_new_tokens=6, do_sample=False, compute=[1.0, adapted.dial.low], runtime="stock")
    assert torch.equal(written(side), wanted[:, 12:])
