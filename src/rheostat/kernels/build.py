"""The native code, compiled once with the system's compiler and kept in the cache.

The C++ under `native/` needs nothing but a compiler: no headers of Python or torch, so it builds in seconds and the
file serves every version of both. One file a processor level; its name is a digest of source, flags and compiler, so
an edit or an upgrade makes a new one, and machines of different levels can share a cache.

`RHEOSTAT_KERNELS` says what to use: `native`, `plain` (the PyTorch twins), or empty: native where it can be built, else
plain with one warning. `RHEOSTAT_KERNELS_LEVEL` (avx512, avx2, portable) takes a lower level than the machine's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rheostat.errors import SettingError, bad_setting
from rheostat.folders import NOTICE, cache_folder

logger = logging.getLogger(__name__)

NATIVE = Path(__file__).with_name("native")

COMPILERS = ("g++", "clang++", "c++")

# Products and sums may fuse; nothing else of what "fast math" would allow is taken.
MATHS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-Wno-psabi", *MATHS)

LEVELS = {
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 "
    "-mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma -mf16c",
    "portable": "",
}
"""Processor level -> the compiler's flags for it, best first."""

NEEDS = {
    "avx512": ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "avx512_bf16"),
    "avx2": ("avx2", "fma3", "f16c"),
    "portable": (),
}
"""Processor level -> what `torch.cpu.get_capabilities` must report."""

TIMEOUT_SECONDS = 300

SCRATCH_SECONDS = 3600
"""Half a file in the cache that is older belongs to no process that still builds."""


def machine_level() -> str:
    """The best level that this machine runs, or the lower one that `RHEOSTAT_KERNELS_LEVEL` asks for.

    Raises:
        SettingError: that variable names no level, or one that the machine does not reach.
    """
    can = torch.cpu.get_capabilities() if platform.machine() in ("x86_64", "AMD64") else {}
    reached = [level for level, needs in NEEDS.items() if all(can.get(name) for name in needs)]
    asked = os.environ.get("RHEOSTAT_KERNELS_LEVEL")
    if asked and asked not in reached:
        raise bad_setting("RHEOSTAT_KERNELS_LEVEL", asked, f"one that this machine reaches: {', '.join(reached)}")
    return asked or reached[0]


def wants_native() -> bool | None:
    """What `RHEOSTAT_KERNELS` asks for: True, False, or None where it is empty.

    Raises:
        SettingError: it is something else.
    """
    asked = os.environ.get("RHEOSTAT_KERNELS", "")
    if asked not in ("", "native", "plain"):
        raise bad_setting("RHEOSTAT_KERNELS", asked, "native, plain, or empty")
    return {"native": True, "plain": False}.get(asked)


def library() -> ctypes.CDLL | None:
    """The native code, compiled if need be, or None where the plain twins have to serve.

    Raises:
        SettingError: `RHEOSTAT_KERNELS=native`, and it cannot be built.
    """
    wanted = wants_native()
    if wanted is False:
        return None
    found = _library(machine_level())
    if isinstance(found, ctypes.CDLL):
        return found
    if wanted:
        raise bad_setting("RHEOSTAT_KERNELS", "native", f"plain or empty on this machine: {found}")
    return None


@functools.cache
def _library(level: str) -> ctypes.CDLL | str:
    """The library, or why there is none (said once, for the answer is kept)."""
    try:
        return _kept(level) or _passing(level)
    except (OSError, SettingError, subprocess.SubprocessError) as error:
        logger.warning("no native kernels, slower ones of PyTorch serve: %s", error)
        return str(error)


def _kept(level: str) -> ctypes.CDLL | None:
    """From the cache; None where there is none that can be used, with the remedy."""
    try:
        folder = cache_folder()
    except SettingError as error:
        reason = str(error)
    else:
        try:
            return load(build(level, folder))
        except OSError as error:
            reason = str(bad_setting("RHEOSTAT_CACHE", str(folder), f"a folder that can be written ({error})"))
    logger.warning("native kernels are compiled anew for each process: %s", reason)
    return None


def _passing(level: str) -> ctypes.CDLL:
    """For this process alone: once loaded, the file is not needed."""
    with tempfile.TemporaryDirectory(prefix="rheostat-kernels-") as folder:
        return load(build(level, Path(folder)))


def load(path: Path) -> ctypes.CDLL:
    """Load a built file. Calls through `ctypes` release the interpreter's lock."""
    return ctypes.CDLL(str(path))


def build(level: str, folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """The built file of a level in `folder`/kernels, compiled unless it is there.

    Args:
        level: one of `LEVELS`.
        extra: more flags for the compiler.

    Raises:
        SettingError: there is no compiler, or it fails.
        OSError: the folder cannot be written.
    """
    compiler = find_compiler()
    flags = [*FLAGS, *LEVELS[level].split(), *extra]
    target = folder / "kernels" / f"{level}-{digest(compiler, flags)}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    # Under a name of its own, then renamed: two processes may build at once, and none ever sees half a file.
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        logger.log(NOTICE, "compiling native kernels for this machine, once; they go to %s", target.parent)
        status, said = _compile([*compiler, *flags, str(NATIVE / "kernels.cpp"), "-o", scratch])
        if status:
            first = next((line for line in said.splitlines() if "error" in line), said[:200])
            raise bad_setting("CXX", " ".join(compiler), f"a compiler of C++17: {first}")
        os.chmod(scratch, 0o755)
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return target


def _compile(command: Sequence[str]) -> tuple[int, str]:
    """Exit status, and what went to standard error. The compiler proper, a child of `command`, never outlives us."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        _, said = process.communicate(timeout=TIMEOUT_SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, said


def _sweep(folder: Path) -> None:
    """Remove what builds left that were killed."""
    for path in folder.glob(".*.so.*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > SCRATCH_SECONDS:
                path.unlink()


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler, as the beginning of its command: `$CXX`, which may have arguments (`ccache g++`), else the
    first of `COMPILERS` on the path.

    Raises:
        SettingError: there is none.
    """
    asked = os.environ.get("CXX", "")
    for command in [_words(asked)] if asked.strip() else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return (path, *command[1:])
    if asked.strip():
        raise bad_setting("CXX", asked, "a command that is on the path, or unset")
    raise SettingError(f"CXX: must be set to a C++ compiler; none of {', '.join(COMPILERS)} is on the path")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise bad_setting("CXX", command, f"a command ({error})") from None


def digest(compiler: tuple[str, ...], flags: list[str]) -> str:
    """Sixteen hexadecimal digits that change with the source, the flags, the compiler and the machine's kind."""
    sha = hashlib.sha256()
    for path in sorted(NATIVE.iterdir()):
        sha.update(f"{path.name}\n".encode() + path.read_bytes())
    sha.update("\n".join([*flags, *compiler, _version(compiler), platform.machine()]).encode())
    return sha.hexdigest()[:16]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS).stdout
