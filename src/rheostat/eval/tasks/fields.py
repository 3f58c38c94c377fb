"""Fields of a row, checked: what is not of its kind would go into the prompt as it is written, and nobody would see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def string(row: Mapping[str, Any], name: str) -> str:
    """A text that is not blank.

    Raises:
        KeyError, TypeError, ValueError: it is missing, of another kind, or blank.
    """
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is of type {type(value).__name__}, not a text")
    if not value.strip():
        raise ValueError(f"{name} is blank")
    return value


def strings(row: Mapping[str, Any], name: str) -> list[str]:
    """A list of at least one text, none of them blank.

    Raises:
        KeyError, TypeError, ValueError: it is missing, empty, or has something else in it.
    """
    values = row[name]
    if not isinstance(values, list):
        raise TypeError(f"{name} is of type {type(values).__name__}, not a list of texts")
    if not values:
        raise ValueError(f"{name} is empty")
    return [string({f"{name}[{at}]": value}, f"{name}[{at}]") for at, value in enumerate(values)]
