"""SHA-256 of large files, remembered: a file that has not changed is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from rheostat.folders import cache_folder
from rheostat.report import write_whole

FILE = "digests.json"
"""In the cache folder: place of a file -> what it looked like, and its digest."""

SETTLED_SECONDS = 2.0
"""A file written less than this ago is not remembered: it could change again within one tick of the file system's
clock, and would look as before."""

MOST = 256
"""Files to remember; the oldest are forgotten."""


def known_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read again unless size, inode and both times are those of the last reading.

    What changes bytes without touching any of these (a failing disk) is seen by `read_digest` alone.

    Raises:
        OSError: the file cannot be read.
    """
    look = _look(file)
    place, known = str(file.resolve()), _remembered()
    if (one := known.get(place)) is not None and one[:-1] == look:
        return str(one[-1])
    digest = read_digest(file)
    newest = max(look[-2:]) / 1e9  # type: ignore[operator]
    if _look(file) == look and time.time() - newest > SETTLED_SECONDS:
        known.pop(place, None)
        kept = dict(list(known.items())[-MOST + 1 :]) | {place: [*look, digest]}
        with contextlib.suppress(Exception):  # a cache that cannot be written costs time, nothing else
            write_whole(cache_folder() / FILE, json.dumps(kept).encode())
    return digest


def read_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _look(file: Path) -> list[int | str]:
    found = os.stat(file)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _remembered() -> dict[str, list[int | str]]:
    try:
        found = json.loads((cache_folder() / FILE).read_text())
        return found if isinstance(found, dict) and all(isinstance(one, list) for one in found.values()) else {}
    except (OSError, ValueError):
        return {}
