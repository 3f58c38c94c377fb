"""How many tokens to draft, by what drafting and checking took so far: none where that is fastest.

Expected tokens of a round that drafts g: 1 + a + ... + a^g, with a the share of drafted tokens accepted among those
that came to be judged. Its time: g drafted tokens and one check of g + 1, each as measured in this run. The g with
the most tokens a second wins, and g = 0 is plain decoding: the text is the same for all.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from statistics import median

from rheostat.errors import bad_setting
from rheostat.speculate.drafter import LONGEST_DRAFT

logger = logging.getLogger(__name__)

AUTO = "auto"

AUTO_LONGEST = 6
"""Tokens that `auto` drafts at most."""

KEPT = 7
"""Newest times of each kind whose median counts: a hiccup of the machine does not."""

OPENING = (AUTO_LONGEST // 2, 0, AUTO_LONGEST, 0)
"""Lengths of the first rounds, to have measured something: few, for where nothing pays they are lost."""

PROBE_EVERY = 24
"""Rounds until what was left out is looked at again; twice as many after each look that changed nothing."""


RAREST = 4 * PROBE_EVERY
"""But no more than so many."""


class Pace:
    """How many tokens to draft in each round. This one: always the same number."""

    verdict = ""
    """What was decided, and why."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    @classmethod
    def of(cls, draft_length: int | str) -> Pace:
        """For a number of tokens, or `auto`.

        Raises:
            SettingError: it is neither, or out of range.
        """
        if draft_length == AUTO:
            return MeasuredPace()
        if (
            isinstance(draft_length, bool)
            or not isinstance(draft_length, int)
            or not 1 <= draft_length <= LONGEST_DRAFT
        ):
            raise bad_setting("draft_length", draft_length, f"an integer from 1 to {LONGEST_DRAFT}, or {AUTO}")
        return Pace(draft_length)

    @classmethod
    def read(cls, text: str) -> int | str:
        """The draft length that a command was given: a number of tokens, or `auto`.

        Raises:
            SettingError: it is neither, or out of range.
        """
        try:
            found: int | str = int(text)
        except ValueError:
            found = text
        cls.of(found)
        return found

    @property
    def length(self) -> int:
        """For the next round."""
        return self.longest

    def note(self, drafted: list[int], kept: list[int], draft_seconds: float, checked_from: float) -> None:
        """A round in which each active row drafted and kept so many; checking began at `checked_from` and ends now."""


class MeasuredPace(Pace):
    """Takes what is fastest."""

    def __init__(self, longest: int = AUTO_LONGEST) -> None:
        super().__init__(longest)
        self._drafts: deque[float] = deque(maxlen=KEPT)
        """Seconds a drafted token."""
        self._checks: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        """Seconds of a check of so many tokens a row."""
        self._judged = self._accepted = 0.0
        self._rounds = self._best = 0
        self._gap = self._next_look = PROBE_EVERY
        self._is_fresh, self._is_decided = True, False

    @property
    def length(self) -> int:
        """What pays; now and then what was left out, in case times have changed."""
        if self._rounds < len(OPENING):
            return min(OPENING[self._rounds], self.longest)
        if self._rounds == self._next_look:
            return 0 if self._best else max(1, self.longest // 2)
        return self._best

    def note(self, drafted: list[int], kept: list[int], draft_seconds: float, checked_from: float) -> None:
        """Learn from a round, and decide."""
        seconds, most = time.perf_counter() - checked_from, max(drafted, default=0)
        has_looked, best = self._rounds == self._next_look, self._best
        self._rounds += 1
        if most and self._is_fresh:
            self._is_fresh = False  # the first draft may have packed its weights
        elif most:
            self._drafts.append(draft_seconds / most)
        self._checks[most + 1].append(seconds)
        for number, right in zip(drafted, kept, strict=True):
            self._accepted += right
            self._judged += right + (right < number)
        if self._judged > 200:  # the text goes on, and what was long ago counts less
            self._judged, self._accepted = self._judged / 2, self._accepted / 2
        if self._rounds >= len(OPENING) and 1 in self._checks:
            self._decide()
        if has_looked:
            self._gap = min(2 * self._gap, RAREST) if self._best == best else PROBE_EVERY
            self._next_look = self._rounds + self._gap

    @property
    def acceptance(self) -> float:
        """Accepted of the drafted tokens that came to be judged, with one doubt added."""
        return (self._accepted + 0.5) / (self._judged + 1)

    def check_seconds(self, num_tokens: int) -> float:
        """A check of so many tokens a row: measured, or on the line through what was."""
        if num_tokens in self._checks:
            return median(self._checks[num_tokens])
        known = sorted(self._checks)
        low, high = known[0], known[-1]
        if low == high:
            return median(self._checks[low])
        slope = (median(self._checks[high]) - median(self._checks[low])) / (high - low)
        return median(self._checks[low]) + slope * (num_tokens - low)

    def rate(self, length: int) -> float:
        """Tokens a second when so many are drafted."""
        tokens = sum(self.acceptance**i for i in range(length + 1))
        drafting = length * median(self._drafts) if length else 0.0
        return tokens / (drafting + self.check_seconds(length + 1))

    def _decide(self) -> None:
        if not self._drafts:
            self.verdict = "no drafts: nothing to guess from was found so far"
            return
        best = max(range(self.longest + 1), key=self.rate)
        if best == self._best and self._is_decided:
            return
        self._best, self._is_decided = best, True
        tried = best or max(range(1, self.longest + 1), key=self.rate)
        chosen, gain = f"drafts of {best}" if best else "no drafts", self.rate(tried) / self.rate(0)
        draft, check, plain = (1e3 * s for s in (median(self._drafts), *map(self.check_seconds, (tried + 1, 1))))
        self.verdict = (
            f"{chosen}: drafts of {tried} are expected to run at {gain:.2f} times the speed of plain decoding "
            f"({draft:.1f} ms a drafted token, {check:.1f} ms a check, {plain:.1f} ms a plain token, "
            f"{self.acceptance:.0%} accepted)"
        )
        logger.info("speculation: %s", self.verdict)
