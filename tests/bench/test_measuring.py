"""Which cells, in which order, against whom: with sides whose times the test sets."""

from __future__ import annotations

import contextlib

import pytest
import torch

from rheostat.bench.measuring import Cell, by_phase, plan, time_cell
from rheostat.bench.roof import Roof
from rheostat.bench.sides import SideSpec, Spent
from rheostat.cost import Cost, Parts
from tests.bench.test_timing import FakeClock
from tests.tiny import tiny_windows

ROOF = Roof(
    machine={}, read=1000.0, rows={"float32": 500.0}, products={"float32": 200.0, "bfloat16": 400.0}, load=0.0, time=""
)


class Scripted:
    """A side that takes the seconds it is told: of a prompt, and of a token."""

    def __init__(self, clock, spec, prefill, decode, log, *, max_rows=None, error=None) -> None:
        self.clock, self.spec, self.log = clock, spec, log
        self.seconds = {"prefill": prefill, "decode": decode}
        self.max_rows, self.error = max_rows, error

    @contextlib.contextmanager
    def session(self):
        yield

    def wait(self) -> None:
        pass

    def prefill(self, ids: torch.Tensor) -> int:
        if self.error is not None:
            raise self.error
        self.log.append((self.spec.label, tuple(ids.shape)))
        self.clock.now += self.seconds["prefill"]
        return 0

    def decode(self, state: int) -> int:
        self.clock.now += self.seconds["decode"]
        return state + 1

    def spent(self, ids: torch.Tensor, num_steps: int) -> Spent:
        prefill = Cost(flops=Parts(ffn=300), bytes=Parts(ffn=800))
        decode = Cost(flops=Parts(ffn=10 * num_steps), bytes=Parts(ffn=200 * num_steps))
        return Spent(prefill, decode, num_steps, 0.6)


def spec(kind: str, dtype: str = "float32", compute: float = 1.0) -> SideSpec:
    return SideSpec(kind=kind, model="m", dtype=dtype, compute=compute)


def measure(make, cell: Cell = Cell(6, 2)):  # noqa: B008  (frozen)
    """Rows, notes and the order of runs, of the sides that `make(clock, log)` gives."""
    clock, log = FakeClock(), []
    rows, notes = time_cell(make(clock, log), tiny_windows(4, 8), cell, new=5, rounds=3, roof=ROOF, clock=clock)
    return rows, notes, log


def two_stocks_and_a_dial(clock, log):
    return [
        Scripted(clock, spec("dial", compute=0.7), 2.0, 0.2, log),
        Scripted(clock, spec("stock", "float32"), 4.0, 0.8, log),
        Scripted(clock, spec("stock", "bfloat16"), 5.0, 0.5, log),
    ]


def test_cells_are_all_prompts_at_the_first_batch_and_all_batches_at_the_first_prompt():
    assert plan([128, 512], [1, 4]) == [Cell(128, 1), Cell(512, 1), Cell(128, 4)]
    assert plan([128, 128], [4]) == [Cell(128, 4)]


def test_sides_try_and_warm_up_and_then_take_turns():
    _, _, log = measure(two_stocks_and_a_dial)
    labels = ["dial 0.7", "stock float32", "stock bfloat16"]
    assert [label for label, _ in log] == labels * (1 + 1 + 3)
    assert {shape for _, shape in log} == {(2, 6)}


def test_a_row_holds_times_rates_and_the_fraction_of_the_roof():
    rows, notes, _ = measure(two_stocks_and_a_dial)
    dial = rows[-1]
    assert notes == []
    assert (dial["side"], dial["kind"], dial["asked"], dial["compute"]) == ("dial 0.7", "dial", 0.7, 0.6)
    assert (dial["prompt"], dial["batch"], dial["new"]) == (6, 2, 5)
    first, token = dial["first_token"], dial["token"]
    assert first["seconds"] == pytest.approx({"median": 2.0, "low": 2.0, "high": 2.0, "rounds": 3})
    assert first["rounds"] == pytest.approx([2.0, 2.0, 2.0])
    assert first["bytes_per_second"] == pytest.approx(400.0)
    assert first["of_bandwidth"] == pytest.approx(400 / 1000)
    assert first["flops_per_second"] == pytest.approx(150.0)
    assert first["of_flops"] == pytest.approx(150 / 200)
    assert token["seconds"]["median"] == pytest.approx(0.2)
    assert token["bytes"] == pytest.approx(200.0)  # of one step, not of all
    assert token["bytes_per_second"] == pytest.approx(1000.0)
    assert dial["prompt_tokens_per_second"] == pytest.approx(6 * 2 / 2.0)
    assert dial["tokens_per_second"] == pytest.approx(2 / 0.2)


def test_each_phase_is_compared_with_the_stock_that_is_best_at_it():
    rows, _, _ = measure(two_stocks_and_a_dial)
    assert [row["side"] for row in rows] == ["stock bfloat16", "stock float32", "dial 0.7"]
    by_side = {row["side"]: row for row in rows}
    dial = by_side["dial 0.7"]
    assert dial["first_token"]["against"] == "stock float32"
    assert dial["first_token"]["speedup"]["median"] == pytest.approx(2.0)
    assert dial["token"]["against"] == "stock bfloat16"
    assert dial["token"]["speedup"]["median"] == pytest.approx(2.5)
    assert by_side["stock float32"]["token"]["speedup"]["median"] == pytest.approx(0.625)
    assert [row["side"] for row in by_phase(rows, "first_token")] == ["stock float32", "stock bfloat16", "dial 0.7"]
    assert by_side["stock bfloat16"]["first_token"]["of_flops"] == pytest.approx(300 / 5 / 400)


def test_without_stock_there_is_nothing_to_compare_with():
    rows, _, _ = measure(lambda clock, log: [Scripted(clock, spec("dial"), 1.0, 0.1, log)])
    assert rows[0]["token"]["speedup"] is rows[0]["token"]["against"] is None


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (NotImplementedError("no kernel"), None),
        (RuntimeError("\"addmm\" not implemented for\n'Half'"), "(\"addmm\" not implemented for 'Half')"),
        (torch.OutOfMemoryError("CUDA"), "(out of memory)"),
    ],
)
def test_a_side_that_cannot_run_is_left_out_with_a_note(error, note):
    def sides(clock, log):
        return [
            Scripted(clock, spec("stock", "float16"), 1.0, 0.1, log, error=error),
            Scripted(clock, spec("dial"), 1.0, 0.1, log),
        ]

    if note is None:  # not about a kernel: our own fault, and not to be hidden
        with pytest.raises(NotImplementedError):
            measure(sides)
        return
    rows, notes, _ = measure(sides)
    assert [row["side"] for row in rows] == ["dial 1"]
    assert notes == [f"stock float16: cannot run prompt 6, batch 2 here {note}"]


def test_a_side_that_takes_one_row_is_left_out_of_batches():
    def sides(clock, log):
        return [Scripted(clock, spec("llama.cpp", "Q4_1"), 1.0, 0.1, log, max_rows=1)]

    rows, notes, log = measure(sides)
    assert (rows, log) == ([], [])
    assert notes == ["llama.cpp Q4_1: not at batch 2, it takes 1 at a time"]
    assert measure(sides, Cell(6, 1))[0][0]["side"] == "llama.cpp Q4_1"
