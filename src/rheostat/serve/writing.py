"""Token ids to text as they come: characters that are not whole yet wait, and stop strings end a text before they
show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNSETTLED = "\ufffd"
"""What bytes show as until their character is whole."""

LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character; more unsettled ones than this will never settle."""

KEPT = 6
"""Tokens before the newest that are decoded again with it, because how a token reads depends on its neighbours."""


class Writer:
    """The text of one answer, given out piece by piece."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, tuple(stops)
        self.token_ids: list[int] = []
        self.is_stopped = False
        """A stop string has come."""
        self._settled = 0
        """Tokens whose text is in `_text`."""
        self._text = ""
        """Decoded so far."""
        self._given = 0
        """Characters of it that were given out."""
        self._hold = max((len(stop) for stop in self.stops), default=1) - 1
        """Characters at the end that may be the beginning of a stop string."""

    @property
    def text(self) -> str:
        """What was given out."""
        return self._text[: self._given]

    def push(self, token_id: int) -> str:
        """Take the next token; returns what can be shown now."""
        self.token_ids.append(token_id)
        self._decode(at_end=False)
        return self._give(at_end=False)

    def finish(self) -> str:
        """The rest, held back until now."""
        self._decode(at_end=True)
        return self._give(at_end=True)

    def _decode(self, *, at_end: bool) -> None:
        first = max(0, self._settled - KEPT)
        before = self.decode(self.token_ids[first : self._settled])
        now = self.decode(self.token_ids[first:])
        open_bytes = len(now) - len(now.rstrip(UNSETTLED))
        if 0 < open_bytes < LONGEST_CHARACTER and not at_end:
            return
        self._text += now[len(before) :]
        self._settled = len(self.token_ids)

    def _give(self, *, at_end: bool) -> str:
        if self.is_stopped:
            return ""
        start = max(0, self._given - self._hold)
        found = [place for stop in self.stops if (place := self._text.find(stop, start)) >= 0]
        if found:
            self.is_stopped = True
            self._text = self._text[: min(found)]
        end = len(self._text) if at_end or found else self._safe_end()
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _safe_end(self) -> int:
        """Where the text may be shown to: before the longest ending that a stop string begins with."""
        for held in range(min(self._hold, len(self._text)), 0, -1):
            ending = self._text[-held:]
            if any(stop.startswith(ending) for stop in self.stops):
                return len(self._text) - held
        return len(self._text)
