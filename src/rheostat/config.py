"""Dataclass <-> YAML <-> command-line flags. One frozen dataclass describes a command; its field docs are its help."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from rheostat.errors import SettingError, bad_setting

C = TypeVar("C")


def setting(default: Any = MISSING, *, help: str, flag: bool = True) -> Any:
    """A field of a command's configuration: its default and its one line of help."""
    metadata = {"help": help, "flag": flag}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    seed: int = setting(0, help="seed of everything random")
    device: str = setting("cpu", help="cpu, cuda, cuda:1, ...")
    dtype: str = setting("float32", help="float32, bfloat16 or float16")
    json: bool = setting(False, help="make the last line of standard output one JSON object with every figure")


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag for each field of `cls`, and --config."""
    parser.add_argument("--config", metavar="FILE.yaml", help="read settings from this file; flags override it")
    hints = typing.get_type_hints(cls)
    for one in fields(cls):
        if not one.metadata.get("flag", True):
            continue
        kind, is_many = _flag_type(hints[one.name])
        name = "--" + one.name.replace("_", "-")
        text = one.metadata["help"] + _default_text(one)
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif is_many:
            parser.add_argument(name, type=lambda s, k=kind: _many(s, k), default=None, help=text, metavar="A,B,...")
        elif kind is dict:
            parser.add_argument(name, action="append", default=None, help=text, metavar="KEY=VALUE")
        else:
            parser.add_argument(name, type=kind, default=None, help=text, metavar=name[2:].upper())


def resolve(cls: type[C], args: argparse.Namespace) -> C:
    """Defaults, overridden by --config, overridden by flags. Unknown keys and wrong types are errors.

    Raises:
        SettingError: names the key, its value and what is allowed.
    """
    values: dict[str, Any] = {}
    if getattr(args, "config", None):
        values |= read_yaml(args.config)
    for one in fields(cls):  # type: ignore[arg-type]
        given = getattr(args, one.name, None)
        if given is None:
            continue
        if isinstance(given, list) and typing.get_origin(typing.get_type_hints(cls)[one.name]) is dict:
            values[one.name] = dict(values.get(one.name) or {}) | dict(_pair(one.name, text) for text in given)
        else:
            values[one.name] = given
    return from_mapping(cls, values)


def from_mapping(cls: type[C], values: Mapping[str, Any]) -> C:
    """An instance of the dataclass `cls` from plain types, checked.

    Raises:
        SettingError: a key is unknown, a required one is missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise bad_setting(key, value, f"one of the settings {', '.join(known)}")
    for name, one in known.items():
        if name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise SettingError(f"{name}: must be given ({one.metadata['help']})")
    return cls(**{key: _convert(key, value, hints[key]) for key, value in values.items()})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingError: the file is missing, is not YAML, or is not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise SettingError(f"config={str(path)!r}: cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        raise SettingError(f"config={str(path)!r}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise bad_setting("config", str(path), "a YAML mapping of settings")
    return content


def _default_text(one: Field[Any]) -> str:
    if one.default is MISSING or one.default is None or one.default == () or isinstance(one.default, bool):
        return ""
    default = ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
    return f" (default: {default})"


def _unwrap(hint: Any) -> Any:
    """The type inside `X | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _flag_type(hint: Any) -> tuple[type, bool]:
    hint = _unwrap(hint)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return typing.get_args(hint)[0], True
    return (dict, False) if origin is dict else (hint, False)


def _many(text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {kind.__name__} values with commas between") from None


def _pair(name: str, text: str) -> tuple[str, Any]:
    import yaml

    key, sep, value = text.partition("=")
    if not sep:
        raise bad_setting(name, text, "KEY=VALUE")
    return key, yaml.safe_load(value)


def _convert(key: str, value: Any, hint: Any) -> Any:
    if value is None:
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            return None
        raise bad_setting(key, value, "given")
    hint = _unwrap(hint)
    origin = typing.get_origin(hint)
    if origin is tuple:
        kind = typing.get_args(hint)[0]
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(key, one, kind) for one in values)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise bad_setting(key, value, "a mapping")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise bad_setting(key, value, "a number") from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise bad_setting(key, value, f"of type {hint.__name__}")
    return value
