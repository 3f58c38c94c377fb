"""Who waits, who runs, who may join: pure data, no tensors and no clock of its own.

First come, first served: a request that does not fit yet holds back those behind it, so that no large request starves.
What a batch holds in memory is a rectangle, rows times the longest row, and that is what the limit bounds.
A long prompt is read in pieces, one a round; prompts that are short enough to be read at once take turns with them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from rheostat.errors import SettingError, bad_setting


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on."""

    rows: int = 8
    """Sequences that are written at once."""
    queue: int = 64
    """Requests that may wait."""
    cache_tokens: int = 65536
    """Rows times the longest row, in tokens: bounds the memory of keys and values."""
    prefill_tokens: int = 1024
    """Prompt tokens read between two steps of the running batch; a longer prompt is read in pieces of so many."""
    queue_seconds: float = float("inf")
    """How long a request may wait for its place; then it is sent away, so that those who are answered are so soon."""

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "cache_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise bad_setting(name, getattr(self, name), "1 or more")
        if not self.queue_seconds > 0:
            raise bad_setting("queue_seconds", self.queue_seconds, "a number of seconds above 0")


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What the scheduler knows of a request."""

    id: str
    num_prompt_tokens: int
    max_new_tokens: int
    num_rows: int = 1
    """Sequences it writes (`n`)."""
    arrived: float = 0.0
    """On a monotonic clock, in seconds."""

    @property
    def longest(self) -> int:
        """Tokens that one of its rows may reach."""
        return self.num_prompt_tokens + self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of a request's prompt to read now, from `start` to before `stop`."""

    id: str
    start: int
    stop: int
    num_prompt_tokens: int

    @property
    def is_last(self) -> bool:
        """Nothing of the prompt is left after it."""
        return self.stop == self.num_prompt_tokens

    @property
    def is_whole(self) -> bool:
        """It is all of the prompt."""
        return self.start == 0 and self.is_last


class Full(Exception):
    """There is no room to wait in; come back later."""


class Draining(Exception):
    """The server finishes what it has and takes nothing new."""


@dataclass
class Scheduler:
    """The queue and the running batch."""

    limits: Limits = field(default_factory=Limits)
    waiting: deque[Ticket] = field(default_factory=deque)
    running: dict[str, Ticket] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    """Running request -> its rows that are still being written."""
    is_draining: bool = False
    reads_pieces: bool = True
    """Whether a prompt can be read in pieces; else each is read at once, however long."""
    _next: Piece | None = None
    """What comes next of the long prompt that is being read."""
    _is_turn_of_short: bool = False

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return sum(self.rows.values())

    @property
    def is_idle(self) -> bool:
        """Nothing to do."""
        return not self.waiting and not self.running

    @property
    def cache_share(self) -> float:
        """Of `cache_tokens`, what the running batch may come to."""
        return self.num_rows * self._longest() / self.limits.cache_tokens

    def check(self, ticket: Ticket) -> None:
        """Refuse a request that could never run.

        Raises:
            SettingError: it is larger than the whole server.
        """
        if ticket.num_rows > self.limits.rows:
            raise bad_setting("n", ticket.num_rows, f"at most {self.limits.rows}, the rows of this server's batch")
        if (size := ticket.num_rows * ticket.longest) > self.limits.cache_tokens:
            allowed = f"at most {self.limits.cache_tokens}: prompt and max_tokens, times n"
            raise SettingError(f"request of {size} tokens: must be {allowed}")

    def offer(self, ticket: Ticket) -> None:
        """Take a request into the queue.

        Raises:
            SettingError: it could never run.
            Draining: nothing new is taken.
            Full: the queue is.
        """
        self.check(ticket)
        if self.is_draining:
            raise Draining
        if len(self.waiting) >= self.limits.queue:
            raise Full
        self.waiting.append(ticket)

    def plan(self) -> list[Piece]:
        """What to read before the next step: prompts that have just moved to the batch, in the order of arrival, as
        far as they fit; or the next piece of a long one."""
        if self._next is None or self._is_turn_of_short:
            self._is_turn_of_short = False
            if pieces := self._admit():
                return pieces
        if (piece := self._next) is None:
            return []
        self._is_turn_of_short = True
        self._next = None if piece.is_last else self._piece(piece.id, piece.stop, piece.num_prompt_tokens)
        return [piece]

    def _admit(self) -> list[Piece]:
        pieces: list[Piece] = []
        tokens = 0
        while self.waiting and self._fits(self.waiting[0]):
            ticket = self.waiting[0]
            tokens += ticket.num_prompt_tokens
            is_long = self.reads_pieces and ticket.num_prompt_tokens > self.limits.prefill_tokens
            if (pieces and tokens > self.limits.prefill_tokens) or (is_long and self._next is not None):
                break
            self.waiting.popleft()
            self.running[ticket.id], self.rows[ticket.id] = ticket, ticket.num_rows
            piece = self._piece(ticket.id, 0, ticket.num_prompt_tokens)
            if not piece.is_last:
                self._next = self._piece(ticket.id, piece.stop, ticket.num_prompt_tokens)
                self._is_turn_of_short = True
            pieces.append(piece)
        return pieces

    def _piece(self, id: str, start: int, num_prompt_tokens: int) -> Piece:
        most = self.limits.prefill_tokens if self.reads_pieces else num_prompt_tokens
        return Piece(id=id, start=start, stop=min(start + most, num_prompt_tokens), num_prompt_tokens=num_prompt_tokens)

    def row_done(self, id: str) -> bool:
        """One row of a request has ended. Returns whether it was the last."""
        self.rows[id] -= 1
        if self.rows[id]:
            return False
        del self.rows[id], self.running[id]
        return True

    def remove(self, id: str) -> bool:
        """Forget a request, waiting or running. Returns whether it was there."""
        if self._next is not None and self._next.id == id:
            self._next = None
        if id in self.running:
            del self.running[id], self.rows[id]
            return True
        before = len(self.waiting)
        self.waiting = deque(one for one in self.waiting if one.id != id)
        return len(self.waiting) < before

    def longest_wait(self, now: float) -> float:
        """Seconds that the head of the queue has waited."""
        return now - self.waiting[0].arrived if self.waiting else 0.0

    def overdue(self, now: float) -> list[str]:
        """Ids of those that have waited for too long."""
        return [one.id for one in self.waiting if now - one.arrived > self.limits.queue_seconds]

    def _longest(self) -> int:
        return max((one.longest for one in self.running.values()), default=0)

    def _fits(self, ticket: Ticket) -> bool:
        rows = self.num_rows + ticket.num_rows
        size = rows * max(self._longest(), ticket.longest)
        return rows <= self.limits.rows and size <= self.limits.cache_tokens
