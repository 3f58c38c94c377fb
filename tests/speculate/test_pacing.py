"""How many tokens `auto` drafts, on a clock of its own."""

from __future__ import annotations

import itertools

import pytest

from rheostat.errors import SettingError
from rheostat.speculate import pacing
from rheostat.speculate.pacing import OPENING, PROBE_EVERY, RAREST, MeasuredPace, Pace


def run(
    monkeypatch, rounds, *, draft=0.002, check=lambda n: 0.010, share=0.9, found=True
) -> tuple[MeasuredPace, list[int]]:
    """A generation in which drafts and checks take these seconds, and every tenth of drafted tokens is wrong."""
    pace, lengths, now = MeasuredPace(), [], [0.0]
    monkeypatch.setattr(pacing.time, "perf_counter", lambda: now[0])
    owed = 0.0
    for _ in range(rounds):
        length = pace.length
        lengths.append(length)
        number = length if found else 0
        owed += share * number
        kept = min(number, int(owed))
        owed -= kept
        begun = now[0] = now[0] + 1
        now[0] += check(number + 1)
        pace.note([number], [kept], draft * number, begun)
    return pace, lengths


def test_what_pays_is_drafted(monkeypatch):
    pace, lengths = run(monkeypatch, 60)
    assert set(lengths[-10:]) == {pace.longest}
    assert pace.verdict.startswith("drafts of 6: ")


def test_what_does_not_pay_is_not_and_the_verdict_says_why(monkeypatch):
    pace, lengths = run(monkeypatch, 60, draft=0.02, share=0.3)
    assert set(lengths[len(OPENING) : PROBE_EVERY]) == {0}
    assert pace.verdict.startswith("no drafts: drafts of 1 are expected to run at 0.")
    assert "20.0 ms a drafted token, 10.0 ms a check, 10.0 ms a plain token" in pace.verdict


def test_looks_become_rare_where_they_change_nothing(monkeypatch):
    _, lengths = run(monkeypatch, 400, draft=0.02, share=0.3)
    looks = [i for i, n in enumerate(lengths) if n and i >= len(OPENING)]
    assert looks[0] == PROBE_EVERY
    gaps = [b - a - 1 for a, b in itertools.pairwise(looks)]
    assert gaps[:3] == [2 * PROBE_EVERY, RAREST, RAREST]


def test_looks_that_find_better_times_change_the_choice(monkeypatch):
    pace, lengths = run(monkeypatch, 30, draft=0.02, share=0.3)
    now = [1e6]
    monkeypatch.setattr(pacing.time, "perf_counter", lambda: now[0])
    for _ in range(400):
        n = pace.length
        lengths.append(n)
        begun = now[0] = now[0] + 1
        now[0] += 0.01
        pace.note([n], [n], 0.0005 * n, begun)
    assert lengths[-1] == pace.longest


def test_a_drafter_that_finds_nothing_is_named_as_the_reason(monkeypatch):
    pace, _ = run(monkeypatch, 20, found=False)
    assert pace.verdict == "no drafts: nothing to guess from was found so far"


@pytest.mark.parametrize("length", [0, -1, 65, 1.5, True, "some"])
def test_lengths_out_of_range_are_refused(length):
    with pytest.raises(SettingError, match="draft_length="):
        Pace.of(length)
