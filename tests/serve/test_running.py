"""A job's own clock and bill."""

from __future__ import annotations

import pytest

from rheostat.serve.jobs import Job
from rheostat.serve.running import Running, ticket_of

JOB = Job(id="one", prompt=[1, 2, 3], max_new_tokens=5, prefill_compute=0.9, compute=0.8, n=2)


def running(**times: float) -> Running:
    one = Running(JOB, lambda event: None, 10.0)
    for name, value in times.items():
        setattr(one, name, value)
    return one


def test_times_of_a_job_from_its_arrival():
    one = running(joined=11.0, read=11.5)
    assert one.note_token(12.0) is None
    assert one.note_token(12.25) == pytest.approx(0.25)
    bill = one.bill(13.0)
    assert (bill.queue_seconds, bill.prefill_seconds, bill.first_token_seconds) == (1.0, 0.5, 2.0)
    assert (bill.decode_seconds, bill.total_seconds) == (0.25, 3.0)


def test_of_one_that_never_began_all_its_time_was_the_queue():
    bill = running().bill(14.0)
    assert (bill.queue_seconds, bill.prefill_seconds, bill.decode_seconds) == (4.0, 0.0, 0.0)
    assert (bill.num_prompt_tokens, bill.num_new_tokens, bill.flops) == (3, 0, 0)


def test_how_far_it_was_lowered():
    one = running()
    one.note_compute(0.8, 0.8, 30)
    assert not one.bill(11.0).is_lowered
    one.note_compute(0.6, 0.8, 10)
    one.note_compute(0.8, 0.8, 10)
    bill = one.bill(11.0)
    assert (bill.is_lowered, bill.lowest, bill.target) == (True, 0.6, pytest.approx(0.76))
    assert running().bill(11.0).target == JOB.compute


def test_the_ticket_has_the_sizes():
    ticket = ticket_of(JOB, 7.0)
    assert (ticket.id, ticket.longest, ticket.num_rows, ticket.arrived) == ("one", 8, 2, 7.0)
