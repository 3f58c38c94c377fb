"""What a user can mend is a `SettingError`: one line that names the setting, its value and what is allowed."""

from __future__ import annotations

from typing import Any


class SettingError(ValueError):
    """A setting is out of its range, or an input cannot be used. The command line answers it with exit status 2."""


def bad_setting(name: str, value: Any, allowed: str) -> SettingError:
    """The error for `name=value`, where `allowed` completes the sentence "must be ..."."""
    return SettingError(f"{name}={value!r}: must be {allowed}")
