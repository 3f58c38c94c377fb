"""The machine's rates: measured on crumbs of work, kept, found again, measured anew when something changed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from rheostat.bench import roof as module
from rheostat.bench.roof import Roof, Sizes, machine, measure_roof, roof_file
from rheostat.bench.timing import threads
from rheostat.errors import bad_setting

CRUMBS = Sizes(block_bytes=1 << 16, width=64, smallest=32, largest=64, repeats=1)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "roof"


class Ticking:
    """Each look takes as long as the last: every run measured takes one tick."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_rates_are_work_over_time():
    roof = measure_roof(sizes=CRUMBS, clock=Ticking(0.01))
    assert roof.read == pytest.approx((1 << 16) / 0.01)
    for dtype in ("float32", "bfloat16", "float16"):
        assert roof.rows[dtype] == pytest.approx((1 << 16) / 0.01)
        assert roof.products[dtype] == pytest.approx(2 * 64**3 / 0.01)  # the larger of both sizes
    assert roof.bandwidth == max(roof.read, *roof.rows.values())


def test_no_larger_product_is_tried_once_one_takes_long():
    roof = measure_roof(sizes=CRUMBS, clock=Ticking(1.0))
    assert roof.products["float32"] == pytest.approx(2 * 32**3)


def test_real_rates_are_above_zero():
    roof = measure_roof(sizes=CRUMBS)
    assert min(roof.read, *roof.rows.values(), *roof.products.values()) > 0
    assert set(roof.rows) >= {"float32", "bfloat16", "float16"}


def test_it_is_measured_once(cache: Path):
    told: list[int] = []
    first = measure_roof(sizes=CRUMBS, clock=Ticking(0.01), progress=lambda what, done, total: told.append(done))
    assert told == list(range(10))
    again = measure_roof(sizes=CRUMBS, clock=Ticking(5.0))
    assert again == first
    (file,) = cache.iterdir()  # nothing temporary is left beside it
    assert file == roof_file(machine(torch.device("cpu")))
    fresh = measure_roof(sizes=CRUMBS, clock=Ticking(5.0), refresh=True)
    assert fresh.read < first.read
    assert measure_roof(sizes=CRUMBS).read == fresh.read


def test_another_number_of_threads_is_another_machine(cache: Path):
    measure_roof(sizes=CRUMBS)
    with threads(torch.get_num_threads() + 1):
        assert measure_roof(sizes=CRUMBS).machine["threads"] == torch.get_num_threads()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "not json", '{"rows": 1}', "damaged rates", "another machine"],
)
def test_a_file_that_is_no_good_is_measured_again(cache: Path, content: str):
    kept = measure_roof(sizes=CRUMBS, clock=Ticking(0.01)).to_dict()
    (file,) = cache.iterdir()
    if content == "damaged rates":
        content = json.dumps(kept | {"rows": {"float32": 0.0}})
    elif content == "another machine":
        content = json.dumps(kept | {"machine": {"device": "abacus"}})
    file.write_text(content)
    assert measure_roof(sizes=CRUMBS, clock=Ticking(1.0)).read == pytest.approx(1 << 16)
    assert json.loads(file.read_text())["read"] == pytest.approx(1 << 16)


def test_an_unwritable_cache_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, caplog):
    def refuse(path: Path, content: bytes) -> None:
        raise bad_setting("out", str(path), "a file that can be written (Permission denied)")

    monkeypatch.setattr(module, "write_whole", refuse)
    with caplog.at_level(logging.WARNING):
        assert measure_roof(sizes=CRUMBS).read > 0
    assert "the roof is not kept" in caplog.text


def test_kernels_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object) -> torch.Tensor:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(torch, "_int_mm", missing)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    roof = measure_roof(sizes=CRUMBS)
    assert "int8" not in roof.rows
    assert "int8" not in roof.products


def test_a_format_that_is_not_multiplied_has_the_machines_best():
    roof = Roof(
        machine={}, read=1.0, rows={"float32": 2.0}, products={"float32": 3.0, "bfloat16": 9.0}, load=0, time=""
    )
    assert (roof.flops("float32"), roof.flops("Q4_1"), roof.bandwidth) == (3.0, 9.0, 2.0)
    assert Roof.from_dict(json.loads(json.dumps(roof.to_dict()))) == roof


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    roof = measure_roof("cuda", sizes=CRUMBS)
    assert roof.machine["device"] == torch.cuda.get_device_name(0)
    assert min(roof.read, *roof.rows.values(), *roof.products.values()) > 0
