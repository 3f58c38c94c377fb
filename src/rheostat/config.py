"""Dataclass <-> YAML <-> command-line flags: one frozen dataclass describes a command, help included."""

from __future__ import annotations

import argparse
import functools
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from rheostat.errors import SettingError, bad_setting

C = TypeVar("C")

EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""Numbers that YAML 1.1 takes for text."""


HIGHEST_SEED = 2**32 - 1
"""Of those that all generators below us take."""


def setting(default: Any = MISSING, *, help: str, flag: bool | str = True) -> Any:
    """A field of a command's configuration: its default and its one line of help.

    Args:
        flag: True for a flag of the field's name, a string for another name, False for a positional argument.
    """
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
    json: bool = setting(False, help="make the last line of output one JSON object with every figure")

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= HIGHEST_SEED:
            raise bad_setting("seed", self.seed, f"from 0 to {HIGHEST_SEED}")


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag or positional argument for each field of `cls`, and --config; all of them may be left out."""
    parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a file; flags override it")
    hints = typing.get_type_hints(cls)
    for one in fields(cls):
        kind, is_many = _flag_type(hints[one.name])
        flag = one.metadata.get("flag", True)
        text = (one.metadata["help"] + _default_text(one)).replace("%", "%%")
        if not flag:
            nargs = "*" if is_many else "?"
            parser.add_argument(one.name, type=kind, nargs=nargs, help=text, metavar=one.name.upper())
            continue
        name = _flag_name(one)
        if kind is bool:
            parser.add_argument(name, dest=one.name, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif is_many:
            many = functools.partial(_many, kind=kind)
            parser.add_argument(name, dest=one.name, type=many, help=text, metavar="A,B,...")
        elif kind is Mapping:
            parser.add_argument(name, dest=one.name, action="append", help=text, metavar="KEY=VALUE")
        else:
            parser.add_argument(name, dest=one.name, type=kind, help=text, metavar=name[2:].upper())


def resolve(cls: type[C], args: argparse.Namespace) -> C:
    """Defaults, overridden by --config, overridden by flags. Unknown keys and wrong types are errors.

    Raises:
        SettingError: names the key, its value and what is allowed.
    """
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    if getattr(args, "config", None):
        values |= _by_field(cls, read_yaml(args.config))
    _shift_positionals(cls, args, values)
    for one in fields(cls):  # type: ignore[arg-type]
        given = getattr(args, one.name, None)
        if given is None or given == []:  # argparse's word for no positional arguments
            continue
        if isinstance(given, list) and typing.get_origin(hints[one.name]) is Mapping:
            before = _convert(one.name, values.get(one.name, {}), hints[one.name])
            values[one.name] = before | dict(_pair(_flag_name(one)[2:], text) for text in given)
        else:
            values[one.name] = given
    return from_mapping(cls, values)


def from_mapping(cls: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    """An instance of the dataclass `cls` from plain types, checked. Errors put `prefix` before each name.

    A key is the name of a field, or of its flag without the leading dashes.

    Raises:
        SettingError: a key is unknown, a required one is missing, or a value has the wrong type.
    """
    hints, values = typing.get_type_hints(cls), _by_field(cls, values, prefix)
    known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise bad_setting(f"{prefix}{key}", value, f"one of the settings {', '.join(known)}")
    for name, one in known.items():
        if name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise SettingError(f"{prefix}{name}: must be given ({one.metadata['help']})")
    return cls(**{key: _convert(f"{prefix}{key}", value, hints[key]) for key, value in values.items()})


def _by_field(cls: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values` under the names of the fields, where a key may be a flag's name; unknown ones as they are."""
    known = {one.name for one in fields(cls)}
    aliases = {_flag_name(one)[2:]: one.name for one in fields(cls)}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key if key in known else aliases.get(key, key)
        if name in found:
            raise bad_setting(f"{prefix}{key}", value, f"given once; {name} is the same setting")
        found[name] = value
    return found


def _shift_positionals(cls: type, args: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Where a file gives some positional arguments, those on the command line may be the others alone."""
    hints = typing.get_type_hints(cls)
    names = [
        one.name for one in fields(cls) if not one.metadata.get("flag", True) and not _flag_type(hints[one.name])[1]
    ]
    given = [getattr(args, name, None) for name in names]
    texts = [text for text in given if text is not None]
    missing = [name for name in names if name not in values]
    if not missing or len(texts) != len(missing):
        return
    for name in names:
        setattr(args, name, texts.pop(0) if name in missing else None)


def _flag_name(one: Field[Any]) -> str:
    flag = one.metadata.get("flag", True)
    return flag if isinstance(flag, str) else "--" + one.name.replace("_", "-")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = _plain(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise SettingError(f"config={str(path)!r}: cannot be read (not UTF-8)") from None
    except OSError as error:
        raise SettingError(f"config={str(path)!r}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SettingError(f"config={str(path)!r}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise bad_setting("config", str(path), "a YAML mapping of settings")
    return content


def _plain(text: str) -> Any:
    """YAML -> plain types, with 1e-3 a number (YAML 1.1 reads it as text).

    Raises:
        ValueError: it is not YAML; one line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.YAMLError(
                        f"{key.value} is given twice, the second time in line {key.start_mark.line + 1}"
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _default_text(one: Field[Any]) -> str:
    if isinstance(one.default, bool):
        return " (default: yes)" if one.default else ""
    if one.default is MISSING or one.default is None or one.default in ("", ()):
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
    return (Mapping, False) if origin is Mapping else (hint, False)


def _many(text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be of type {kind.__name__}, with commas between") from None


def _pair(name: str, text: str) -> tuple[str, Any]:
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise bad_setting(name, text, "KEY=VALUE")
    try:
        return key.strip(), _plain(value)
    except ValueError as error:
        raise bad_setting(name, text, f"KEY=VALUE with a value in YAML ({error})") from None


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
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise bad_setting(key, value, "a mapping")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise bad_setting(key, value, f"of type {hint.__name__}")
    return value
