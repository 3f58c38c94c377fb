"""One command's figures with where they come from, as JSON; and files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rheostat.errors import bad_setting
from rheostat.provenance import provenance


def origin(*, seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """`provenance`, with the command as it can be typed again."""
    return provenance(seed=seed, command=shlex.join(["rheostat", *sys.argv[1:]]), **extra)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(figures: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON of plain types; numbers that JSON does not have (infinity, not a number) become null."""
    return json.dumps(_finite(figures), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it and rename it; makes the folder.

    Raises:
        SettingError: the folder cannot be written, or the disk is full. An older file is then left as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise bad_setting("out", str(path), "on a disk with room left; it is full") from None
        raise bad_setting("out", str(path), f"a file that can be written ({error.strerror})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
