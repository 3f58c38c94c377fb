"""One row a setting, from texts, tasks and times together."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rheostat.report.schema import check
from rheostat.report.summary import average_choice, summary
from tests.report.sample import sample


def task(name: str, metric: str, compute: float, score: float, kind: str = "dial", **more: Any) -> dict[str, Any]:
    shared = {"stderr": 0.02, "rows": 100, "is_choice": True, "kind": "dense" if compute == 1 else kind}
    return {"task": name, "metric": metric, "compute": compute, "score": score} | shared | more


QUIZ = [
    task("hard", "acc", 1.0, 0.5),
    task("hard", "acc_norm", 1.0, 0.6, stderr=0.03),
    task("easy", "acc", 1.0, 0.8, rows=300),
    task("hard", "acc", 0.8, 0.4),
    task("hard", "acc_norm", 0.8, 0.5),
    task("easy", "acc", 0.8, 0.7, rows=300),
    task("hard", "acc_norm", 0.8, 0.3, "static"),
    task("easy", "acc", 0.8, 0.6, "static", rows=300),
    task("last word", "acc", 1.0, 0.1, is_choice=False),
]


def test_each_task_counts_once_by_its_normalised_accuracy():
    found = average_choice(QUIZ)
    assert found["dense", 1.0] == (pytest.approx(0.7), pytest.approx(math.hypot(0.03, 0.02) / 2), 2, 400)
    assert found["dial", 0.8][0] == pytest.approx(0.6)
    assert found["static", 0.8][0] == pytest.approx(0.45)


def test_a_setting_that_left_a_task_out_has_no_average():
    assert set(average_choice([one for one in QUIZ if (one["task"], one["compute"]) != ("easy", 1.0)])) == {
        ("dial", 0.8),
        ("static", 0.8),
    }


def test_one_row_a_setting_with_all_that_is_known_of_it():
    report = check(sample("words") | {"tasks": QUIZ})
    table = summary(report)
    rows = {row[:2]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    assert next(iter(rows)) == ("dense", "1")
    assert ("static", "0.8") in rows
    dial = rows["dial", "0.8"]
    assert dial["2 choice tasks, mean accuracy (400 questions)"] == "60.0% ± 1.4"
    assert dial["first token, ms"] == "720"
    assert dial["tokens/s"] == "15.62"
    assert "x)" in dial["perplexity, words"]
    assert rows["static", "0.8"]["first token, ms"] == "n/a"
    assert rows["dense", "1"]["first token, ms"] == "n/a"  # stock's was not measured in this sample


def test_the_dense_row_has_the_quickest_stock_side_of_each_measure():
    stock = [
        {"side": "stock bfloat16", "compute": None, "ttft_ms": 100.0, "tokens_per_s": 25.0},
        {"side": "stock float16", "compute": None, "ttft_ms": 900.0, "tokens_per_s": 50.0},
        {"side": "stock float32", "compute": None, "ttft_ms": 200.0, "tokens_per_s": 18.0},
        {"side": "llama.cpp", "compute": None, "ttft_ms": 1.0, "tokens_per_s": 99.0},
    ]
    table = summary(check(sample("words") | {"bench": stock}))
    dense = dict(zip(table.headings, table.rows[0], strict=True))
    assert (dense["first token, ms"], dense["tokens/s"]) == ("100", "50")


def test_our_quickest_side_stands_for_a_setting_and_low_bits_stand_apart():
    bench = [
        {"side": "dial", "compute": 0.8, "ttft_ms": 300.0, "tokens_per_s": 20.0},
        {"side": "native fp16", "compute": 0.8, "ttft_ms": 310.0, "tokens_per_s": 90.0},
        {"side": "native int8", "compute": 0.8, "ttft_ms": 290.0, "tokens_per_s": 200.0},
    ]
    table = summary(check(sample("words") | {"bench": bench}))
    dial = next(dict(zip(table.headings, row, strict=True)) for row in table.rows if row[:2] == ("dial", "0.8"))
    assert (dial["first token, ms"], dial["tokens/s"], dial["tokens/s, low-bit weights"]) == ("300", "90", "200")


def test_texts_alone_need_no_summary():
    report = sample("words")
    del report["tasks"], report["bench"]
    assert summary(check(report)) is None
