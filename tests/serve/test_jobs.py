"""The bill as a client reads it."""

from __future__ import annotations

from dataclasses import replace

from tests.serve.test_deploy import BILL


def test_one_number_where_prompt_and_answer_were_asked_alike_and_two_where_not():
    assert BILL.to_dict()["asked"] == 1.0
    apart = {"prefill": 0.6, "decode": 0.9}
    assert replace(BILL, asked=apart).to_dict()["asked"] == apart


def test_times_are_in_milliseconds():
    found = BILL.to_dict()
    assert (found["queue_ms"], found["time_to_first_token_ms"], found["total_ms"]) == (100.0, 200.0, 300.0)
