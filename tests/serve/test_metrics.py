"""What is counted of an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from rheostat.serve.metrics import Metrics
from tests.serve.test_deploy import BILL


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"rheostat_{name}", {"model_name": "tiny"} | labels)


def test_an_answer_is_counted_with_its_bill():
    metrics = Metrics("tiny")
    metrics.finished("stop", BILL)
    metrics.finished("length", replace(BILL, is_lowered=True))
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "generation_tokens_total") == 4
    assert (value(metrics, "flops_total"), value(metrics, "dense_flops_total")) == (16, 20)
    assert value(metrics, "ffn_tokens_total", width="0.5") == 2
    assert value(metrics, "lowered_requests_total") == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 2
    assert value(metrics, "compute_fraction_bucket", le="0.75") == 0
    assert value(metrics, "compute_fraction_bucket", le="0.8") == 2
    assert value(metrics, "compute_beyond_target_bucket", le="0.02") == 0
    assert value(metrics, "compute_beyond_target_bucket", le="0.1") == 2  # 0.8 for 0.75


def test_what_was_never_begun_is_in_no_histogram_and_reads_no_prompt():
    metrics = Metrics("tiny")
    metrics.finished("cancelled", replace(BILL, num_new_tokens=0, prefill_seconds=0.0, flops=0, dense_flops=0))
    assert value(metrics, "request_success_total", finished_reason="cancelled") == 1
    assert value(metrics, "time_to_first_token_seconds_count") in (None, 0)
    assert value(metrics, "prompt_tokens_total") == 0


def test_the_time_between_tokens_has_no_entry_for_the_first():
    metrics = Metrics("tiny")
    for seconds in (None, 0.004, 0.004):
        metrics.token(seconds)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.005") == 2
    assert value(metrics, "inter_token_latency_seconds_count") == 2


def test_gauges_are_read_when_somebody_asks():
    state = {"running": 1, "rows": 2, "waiting": 3, "cache_share": 0.5, "level": 0.25}
    engine: Any = SimpleNamespace(state=lambda: state, backend=SimpleNamespace(cache_bytes=64))
    metrics = Metrics("tiny")
    metrics.watch(engine)
    state["waiting"] = 9
    text = metrics.text().decode()
    for line in ('num_requests_waiting{model_name="tiny"} 9.0', 'kv_cache_bytes{model_name="tiny"} 64.0'):
        assert f"rheostat_{line}" in text
    assert value(metrics, "adaptive_level") == 0.25
