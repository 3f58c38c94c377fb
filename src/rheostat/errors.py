"""What a user can mend is a `SettingError`: one line that names the setting, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SettingError(ValueError):
    """A setting is out of its range, or an input cannot be used. The command line answers it with exit status 2."""


def bad_setting(name: str, value: Any, allowed: str) -> SettingError:
    """The error for `name=value`, where `allowed` completes the sentence "must be ..."."""
    return SettingError(f"{name}={value!r}: must be {allowed}")


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Errors about a setting speak of it under the name by which the user gave it: `renamed(risk="draft_risk")`."""
    try:
        yield
    except SettingError as error:
        name, sign, rest = str(error).partition("=")
        if not sign or name not in names:
            raise
        raise SettingError(f"{names[name]}={rest}") from error.__cause__


def check_text(text: str) -> None:
    """Refuse what JSON and arguments can hold and UTF-8 cannot: half of a surrogate pair.

    Raises:
        SettingError: it is in there.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingError("prompt: must be Unicode text in UTF-8, without half surrogate pairs") from None
