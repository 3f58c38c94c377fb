"""Tables as people see them."""

from __future__ import annotations

import io

import pytest

from rheostat.bench.tables import is_busy, memory_table, phase_table, roof_table
from rheostat.terminal import console
from tests.bench.test_measuring import measure, two_stocks_and_a_dial


def shown(table) -> list[str]:
    """Lines, with single spaces."""
    stream = io.StringIO()
    console(stream).print(table)
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_a_row_shows_time_spread_comparison_and_roof():
    rows, _, _ = measure(two_stocks_and_a_dial)
    for row in rows:
        row["token"]["bytes_per_second"] *= 1e9
        row["token"]["flops_per_second"] *= 1e9
    lines = shown(phase_table(rows, "token", "time per output token", "prompt"))
    assert lines[0] == "time per output token"
    assert lines[-3].startswith("6 stock bfloat16 0.60 500 500–500 4 1 ")
    assert lines[-2].startswith("stock float32 0.60 800 800–800 2 0.62x")
    assert lines[-1] == "dial 0.7 0.60 200 200–200 10 2.50x (2.50–2.50) 1e+03 100% 50 25%"


def test_the_first_token_has_its_own_order():
    rows, _, _ = measure(two_stocks_and_a_dial)
    lines = shown(phase_table(rows, "first_token", "time to first token", "batch"))
    assert lines[-3].startswith("2 stock float32 0.60 4000 4000–4000 3 1 ")
    assert lines[-2].startswith("stock bfloat16")


def test_rates_of_the_machine():
    place = {"device": "Abacus", "threads": 2, "simd": "AVX2", "torch": "2.13"}
    roof = {"machine": place, "read": 3e10, "rows": {"float32": 1e10}, "products": {"float32": 2e11, "int8": 5e11}}
    lines = shown(roof_table(roof))
    assert lines[0] == "roof of Abacus, 2 threads, AVX2, torch 2.13"
    assert lines[2:] == ["float32 10 200", "int8 – 500", "plain reading 30"]


def test_memory():
    found = [
        {"side": "dial 1", "prompt": 8, "batch": 1, "loaded_bytes": 4e8, "peak_bytes": 5e8, "is_whole": True},
        {"side": "stock float32", "prompt": 8, "batch": 1, "error": "no room"},
    ]
    lines = shown(memory_table(found))
    assert lines[0] == "memory, prompt 8, batch 1"
    assert lines[2:] == ["dial 1 400 MB 500 MB (loading included)", "stock float32 failed"]


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(0.2, 2, False), (1.5, 2, True), (1.5, None, True), (3, 16, False)]
)
def test_a_busy_machine(load, cores, busy):
    assert is_busy(load, cores) is busy
