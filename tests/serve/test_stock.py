"""Rows on `transformers`, one after the other."""

from __future__ import annotations

import pytest
import torch

from rheostat.meter import Meter
from rheostat.serve.backend import Join, Row
from rheostat.serve.stock import StockBackend, newest_width
from tests.serve.conftest import Tiny


def test_rows_of_one_prompt_share_its_reading_and_nothing_after(tiny: Tiny):
    backend, meter = StockBackend(tiny.adapted), Meter(keep_passes=False)
    rows = [Row([5, 6, 7], meter) for _ in range(3)]
    backend.join([Join(rows, 0.75)])
    assert meter.tokens == 3
    assert all(torch.equal(one.logits, rows[0].logits) for one in rows)
    backend.step(rows, [30, 31, 30], [1.0, 1.0, 1.0])
    assert torch.equal(rows[0].logits, rows[2].logits)
    assert not torch.equal(rows[0].logits, rows[1].logits)
    backend.leave(rows[1])
    backend.step([rows[0], rows[2]], [32, 33], [1.0, 0.75])
    assert not torch.equal(rows[0].logits, rows[2].logits)
    assert (rows[0].width, rows[2].width) == (1.0, pytest.approx(newest_width(meter)))


def test_a_prompt_is_read_in_one_go(tiny: Tiny):
    backend, one = StockBackend(tiny.adapted), Row([5, 6, 7], Meter(keep_passes=False))
    with pytest.raises(AssertionError, match="in one go"):
        backend.read(Join([one], 1.0), 0, 2)
    backend.read(Join([one], 1.0), 0, 3)
    assert one.state.num_tokens == 3


def test_the_width_of_nothing_is_the_whole():
    assert newest_width(Meter()) == 1.0
