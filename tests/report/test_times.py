"""From the figures of `rheostat bench` to the rows of a report."""

from __future__ import annotations

import pytest

from rheostat.report.times import times


def row(kind: str, side: str, prompt: int, batch: int, seconds: float) -> dict:
    spread = {"median": seconds, "low": seconds / 2, "high": seconds * 2}
    phases = {"first_token": {"seconds": spread}, "token": {"seconds": spread}}
    return {"kind": kind, "side": side, "asked": 0.8, "prompt": prompt, "batch": batch} | phases


def test_the_longest_prompt_at_the_first_batch_size():
    figures = {
        "settings": {"prompts": [16, 64], "batch": [2, 4]},
        "rows": [
            row("stock", "stock float32", 64, 2, 0.5),
            row("dial", "dial 0.8", 64, 2, 0.25),
            row("native", "native int8 0.8", 64, 2, 0.2),
            row("dial", "dial 0.8", 16, 2, 0.1),
            row("dial", "dial 0.8", 64, 4, 0.4),
        ],
    }
    stock, dial, native = times(figures)
    assert (native["side"], native["compute"]) == ("native int8", 0.8)
    assert (stock["side"], stock["compute"]) == ("stock float32", None)
    assert (dial["side"], dial["compute"], dial["prompt"], dial["batch"]) == ("dial", 0.8, 64, 2)
    assert dial["ttft_ms"] == {"median": 250.0, "low": 125.0, "high": 500.0}
    assert dial["tokens_per_s"] == pytest.approx({"median": 8.0, "low": 4.0, "high": 16.0})


def test_what_drafting_came_to_is_kept():
    drafted = row("native", "native int8 self 0.8", 64, 2, 0.2)
    drafted["token"]["bytes"] = 1000
    drafted["drafts"] = {"acceptance": 0.5, "acceptance_by_place": [0.75, 0.25], "tokens_per_round": 2.0, "rounds": 9}
    plain = row("native", "native int8 0.8", 64, 2, 0.2) | {"drafts": None}
    one, other = times({"settings": {"prompts": [64], "batch": [2]}, "rows": [drafted, plain]})
    assert one["side"] == "native int8 self"
    assert one["drafts"] == {
        "acceptance": 0.5,
        "acceptance_by_place": [0.75, 0.25],
        "tokens_per_round": 2.0,
        "bytes_per_token": 500.0,
    }
    assert "drafts" not in other
