"""Writing an answer on a terminal as its tokens come, each in the colour of what it cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from rheostat import terminal

LONGEST_CHARACTER = 3
"""Bytes of a UTF-8 character that can come before its last; each may show as a replacement character."""


class Writer:
    """Writes tokens as they come, as text: holds back the bytes of a character that is not whole yet."""

    def __init__(self, stream: TextIO, decode: Callable[..., Any], low: float | None) -> None:
        self.stream, self.decode, self.low = stream, decode, low
        self.token_ids: list[int] = []
        self.text = ""
        """Written so far."""

    def push(self, token_id: int, fraction: float) -> None:
        """Take the next token, whose FFN width was `fraction`."""
        self.token_ids.append(token_id)
        text = self._decoded()
        self._write(text[: len(text) - num_unsettled(text)], fraction)
        self.fraction = fraction

    def finish(self) -> None:
        """Write what was held back."""
        if self.token_ids:
            self._write(self._decoded(), self.fraction)

    def _decoded(self) -> str:
        # From the beginning, because how a token reads depends on those before it.
        return self.decode(self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _write(self, settled: str, fraction: float) -> None:
        piece = settled[len(self.text) :]
        if not piece:
            return
        self.text += piece
        piece = terminal.printable(piece)
        if self.low is not None:
            piece = terminal.paint(piece, terminal.ramp_colour(fraction, self.low))
        self.stream.write(piece)
        self.stream.flush()


def num_unsettled(text: str) -> int:
    """How many characters at the end the next bytes may change: replacement characters, up to the limit."""
    return min(len(text) - len(text.rstrip("\ufffd")), LONGEST_CHARACTER)
