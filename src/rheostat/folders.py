"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rheostat.errors import SettingError, bad_setting

OURS = ("config.json", "rheostat.json")
"""A folder with one of these may be replaced: what is lost there is a model that somebody asked to overwrite."""

NOTICE = 25
"""Level of the log records about work that is done once and kept in the cache. Commands show them: it takes a while."""


def cache_folder() -> Path:
    """Where converted copies go: `$RHEOSTAT_CACHE`, else `rheostat` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        SettingError: none of the three can be had.
    """
    folder, base = os.environ.get("RHEOSTAT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if folder:
            return Path(folder).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "rheostat"
    except RuntimeError:  # as some containers run: a user of whom the system knows nothing
        raise bad_setting(
            "RHEOSTAT_CACHE", folder, "a folder that can be written: there is no home directory"
        ) from None


def check_output(path: str | Path, *, overwrite: bool, needed_bytes: int = 0, is_replaced: bool = True) -> Path:
    """Refuse, before any work is done, an output folder that could not be written at the end.

    Args:
        path: the folder, or a link to it, which stays one.
        overwrite: it may exist.
        needed_bytes: that must be free on its disk.
        is_replaced: what it holds goes away; else files join it.

    Raises:
        SettingError: it exists and `overwrite` is off or it is not one that we would write, it or its parent cannot
            be written, its name is none, or the disk is too full.
    """
    path = Path(path)
    try:
        _check_folder(path, overwrite, is_replaced)
        _check_place(path, needed_bytes, is_replaced)
    except OSError as error:  # a name too long, for one
        raise bad_setting("out", str(path), f"a folder that can be made ({error.strerror})") from None
    return path


def _check_folder(path: Path, overwrite: bool, is_replaced: bool) -> None:
    if path.exists() and not overwrite:
        raise bad_setting("out", str(path), "a folder that does not exist yet (or use --overwrite)")
    if path.exists() and not path.is_dir():
        raise bad_setting("out", str(path), "a folder, this is a file")
    strange = is_replaced and path.exists() and any(path.iterdir())
    if strange and not any((path / name).is_file() for name in OURS):
        raise bad_setting("out", str(path), f"a model's folder, an empty or a new one; this one holds no {OURS[0]}")


def _check_place(path: Path, needed_bytes: int, is_replaced: bool) -> None:
    """Where something must be written: the folder itself where files join it, else the one above it."""
    parent = path if path.is_dir() and not is_replaced else _existing_parent(path)
    if not parent.is_dir():
        raise bad_setting("out", str(path), f"in a folder, and {parent} is a file")
    if not os.access(parent, os.W_OK):
        where = (
            "a folder that can be written" if parent == path else f"in a folder that can be written; {parent} cannot"
        )
        raise bad_setting("out", str(path), where)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise bad_setting(
            "out", str(path), f"on a disk with {needed_bytes / 1e9:.1f} GB free; {parent} has {free / 1e9:.1f} GB"
        )


def _existing_parent(path: Path) -> Path:
    parent = _real(path).parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _real(path: Path) -> Path:
    """`path` without links. A link must not be what is renamed: the folder that it names is."""
    return Path(os.path.realpath(path))


@contextmanager
def whole_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed to `path` when the block ends well, and removed when it
    does not. Where `path` is a link, all this is about the folder that it names.

    Raises:
        SettingError: `path` exists and `overwrite` is off, or the disk is full or cannot be written.
    """
    given = check_output(path, overwrite=overwrite)
    path, temporary = _real(given), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        _share(temporary)
        if path.exists():
            old = temporary.with_name(temporary.name + ".old")
            path.rename(old)
            try:
                temporary.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise bad_setting("out", str(given), "on a disk with room left; it is full") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise bad_setting("out", str(given), "in a folder that can be written") from None
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error, with the system's words in it.
        if "No space left" in str(error) and not isinstance(error, SettingError):
            raise bad_setting("out", str(given), "on a disk with room left; it is full") from None
        raise
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give the files the rights that the user's umask gives new ones: safetensors writes for the owner alone, and a
    model is often served by another user."""
    probe = folder / ".rights"
    probe.touch()
    rights = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(rights)
