"""Batches: rows that are read, gone on with, checked and taken back give what each row gives alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from rheostat.adapted import Adapted
from rheostat.cost import Cost
from rheostat.runtime.batch import Batch, keys_and_values
from rheostat.runtime.building import Unsupported
from rheostat.runtime.engine import Runtime
from rheostat.spending import spend
from tests.tiny import tiny_adapted, tiny_model, tiny_windows

IDS = tiny_windows(2, 24)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def read(adapted: Adapted, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: torch.Tensor) -> Batch:
    """A batch in float32."""
    return Batch.read(Runtime(adapted.model, "fp32", adapted.hook_ids), ids, mask, settings)


@torch.inference_mode()
def test_rows_of_several_lengths_are_read_as_each_alone():
    adapted = Adapted(tiny_model())
    mask = torch.tensor([[1] * 24, [0] * 9 + [1] * 15])
    batch = read(adapted, IDS, mask)
    assert batch.positions.tolist() == [24, 15]
    for row, start in enumerate((0, 9)):
        alone = read(adapted, IDS[row : row + 1, start:])
        torch.testing.assert_close(batch.logits[row : row + 1], alone.logits, **CLOSE)


@torch.inference_mode()
def test_what_was_checked_and_taken_back_leaves_no_trace():
    adapted = Adapted(tiny_model())
    batch, other = (read(adapted, IDS[:, :12]) for _ in range(2))
    counts = [3, 1]
    tokens = torch.cat([IDS[0, 12:15], IDS[1, 12:13]])
    logits, _ = batch.check(tokens, None, counts)
    first = other.step(IDS[:, 12].contiguous(), None)
    torch.testing.assert_close(logits[[0, 3]], first, **CLOSE)
    batch.take_back([2, 0])
    assert batch.positions.tolist() == other.positions.tolist() == [13, 13]
    token = IDS[:, 20].contiguous()
    torch.testing.assert_close(batch.step(token, None), other.step(token, None), **CLOSE)


def test_steps_are_billed_once_however_often_they_are_settled():
    """And to the meter that was open when they ran."""
    adapted = tiny_adapted()
    late, eager = bills(adapted, is_eager=False), bills(adapted, is_eager=True)
    assert late == eager
    assert late[0].flops.total < late[1].flops.total, "a longer past costs more"


@torch.inference_mode()
def bills(adapted: Adapted, *, is_eager: bool) -> list[Cost]:
    """Of two times three steps of one batch, settled after each step or only at the end."""
    batch, meters = read(adapted, IDS[:, :12]), []
    for start in (12, 15):
        with spend() as meter:
            for place in range(start, start + 3):
                batch.step(IDS[:, place].contiguous(), None)
                if is_eager:
                    batch.settle()
        meters.append(meter)
    batch.settle()
    batch.settle()
    return [meter.cost for meter in meters]


def test_going_on_from_another_cache():
    adapted = Adapted(tiny_model())
    runtime = Runtime(adapted.model, "fp32", adapted.hook_ids)
    mask = torch.tensor([[1] * 18, [0] * 7 + [1] * 11])
    cache = adapted.method.make_cache(adapted.model)
    with torch.inference_mode():
        logits = adapted.method.prefill(adapted.model, IDS[:, :18], mask, cache)
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        batch = Batch.resume(runtime, pairs, mask, logits)
        direct = Batch.read(runtime, IDS[:, :18], mask, {})
        for place in range(18, 24):
            a, b = (one.step(IDS[:, place].contiguous(), None) for one in (batch, direct))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_a_whole_cache_is_gone_on_with():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(IDS[:, :12], past_key_values=cache)
    pairs = keys_and_values(cache, 12)
    assert [tuple(keys.shape[::2]) for keys, _ in pairs] == [(2, 12)] * model.config.num_hidden_layers
    with pytest.raises(Unsupported, match="dropped"):
        keys_and_values(cache, 13)
    with pytest.raises(Unsupported, match="DynamicLayer"):
        keys_and_values(DynamicCache(config=model.config), 0)
