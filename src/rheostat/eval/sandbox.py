"""Running programs that a model wrote, to see whether they pass their tests.

Each program runs in a process of its own, in layers that do not rely on each other. `Outcome.layers` names those
in force; which there are depends on the kernel and on the container around us.

- `limits`: processor time, address space, size of a file, open files, processes. A wall clock outside ends the
  program and all it started. Output goes nowhere. The environment is empty, standard input too.
- `namespaces` (where the kernel allows it): the program sees no other process, cannot send them a signal, and has no
  network device, not even a working loopback. What it leaves running ends with it.
- `files` (with `namespaces`): all files are read-only; the working folder is a small file system in memory.
- `user`: no capabilities; where we are root, another user. (Of root's rights one is kept: reading.)
- `guard`: an audit hook inside the interpreter refuses sockets, processes, signals to others, C libraries, and
  writing outside the working folder.

What they do not stop. `guard` stands alone where there are no namespaces (most containers); it stops what programs do
in Python, not an attacker who knows CPython. No layer hides files that the user may read, and Unix sockets of other
programs are kept off by `guard` alone. Nor can anything keep a program in whose process the tests run from deceiving
them on purpose, by redefining equality, say. This is a fence around what models write by accident, not around malware;
for that, run the whole evaluation in a virtual machine.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from rheostat.errors import SettingError, bad_setting
from rheostat.eval import sandbox_child, sandbox_guard

WALL_FACTOR = 5
"""Wall clock a program may take, as a multiple of its processor time: what waits for its turn on a busy machine is not
slow, and what sleeps must end too."""
START_SECONDS = 600.0
"""What the interpreter may take to start on a busy machine. If it takes longer, something is broken."""
MIN_MEMORY_MB = 64
TAIL_BYTES = 4096
REPORT_BYTES = 65536


class Status(StrEnum):
    """How a program ended."""

    PASSED = "passed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out-of-memory"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one program ended."""

    status: Status
    detail: str
    """The last line of its error output, or what else ended it; empty when it passed."""
    layers: tuple[str, ...]
    """Which layers of the sandbox were in force."""

    @property
    def passed(self) -> bool:
        """Whether program and tests ran to their end."""
        return self.status == Status.PASSED


def run_program(
    source: str, *, tests: str = "", seconds: float, memory_mb: int, kernel: bool = True, guard: bool = True
) -> Outcome:
    """Run `source`, then `tests` in the same namespace, in the sandbox that this module describes.

    It passes if both run to their end: no exception, no early exit. The tests are compiled on their own, so
    that no unfinished string in the source can swallow them. What the source puts under
    `if __name__ == "__main__"` does not run. Strings hash the same in every run, so results repeat.

    Args:
        seconds: processor time for the program, in effect rounded up to whole seconds; on the wall clock it may take
            `WALL_FACTOR` times as long. The start of the interpreter is not counted.
        memory_mb: address space of each process, in MiB (2^20 bytes), the interpreter's own of about 20 included.
        kernel: try the layers that the kernel holds up. Off only to test the others.
        guard: install the guard. Off only to test the others.

    Raises:
        SettingError: a limit is out of range, or this is not Linux.
        RuntimeError: the sandbox itself did not start; nothing is known about the program.
    """
    _check(seconds, memory_mb)
    nonce = secrets.token_hex(16).encode()
    folder = Path(tempfile.mkdtemp(prefix="rheostat-program-"))
    nonce_out, nonce_in = os.pipe()
    report_out, report_in = os.pipe()
    try:
        os.write(nonce_in, nonce)
        with tempfile.TemporaryFile("w+") as parts, tempfile.TemporaryFile() as errors:
            json.dump([source, tests], parts)
            parts.seek(0)  # flushes
            settings = {
                "source": parts.fileno(),
                "nonce": nonce_out,
                "report": report_in,
                "seconds": seconds,
                "wall_seconds": seconds * WALL_FACTOR,
                "memory_bytes": memory_mb * 2**20,
                "kernel": kernel,
                "guard": guard,
                "guard_file": sandbox_guard.__file__,
                "started_by_root": os.geteuid() == 0,
            }
            status = _run_child(settings, folder, errors)
            os.set_blocking(report_out, False)
            try:
                report = os.read(report_out, REPORT_BYTES)
            except BlockingIOError:
                report = b""
            return _outcome(status, report, nonce, _tail(errors))
    finally:
        for descriptor in (nonce_out, nonce_in, report_out, report_in):
            os.close(descriptor)
        _remove(folder)


def _check(seconds: float, memory_mb: int) -> None:
    if not sys.platform.startswith("linux"):
        raise SettingError(f"tasks: programs written by a model run on Linux only, this is {sys.platform}")
    if not (0 < seconds < math.inf):
        raise bad_setting("seconds", seconds, "a number above 0")
    if memory_mb < MIN_MEMORY_MB:
        raise bad_setting("memory_mb", memory_mb, f"at least {MIN_MEMORY_MB}")


def _run_child(settings: dict[str, object], folder: Path, errors: IO[bytes]) -> int:
    """The exit status of the sandbox's process, which is gone when this returns, and its children with it."""
    descriptors = [settings[name] for name in ("source", "nonce", "report")]
    # As `python -I`, but for one variable of the environment that -I would not read.
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", sandbox_child.__file__, json.dumps(settings)],
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=descriptors,  # type: ignore[arg-type]
        start_new_session=True,
    )
    try:
        return process.wait(float(settings["wall_seconds"]) + START_SECONDS)  # type: ignore[arg-type]
    except subprocess.TimeoutExpired:
        return sandbox_child.EXIT_TIMEOUT
    finally:  # also when we are interrupted
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _outcome(status: int, report: bytes, nonce: bytes, last_line: str) -> Outcome:
    lines = report.decode("utf-8", "replace").splitlines()
    if not lines or not lines[0].startswith("layers "):
        raise RuntimeError(
            f"the sandbox for programs did not start (exit status {status}): {last_line or 'no message'}"
        )
    layers = tuple(lines[0].split()[1:])
    end, _, detail = lines[1].partition(" ") if len(lines) > 1 else ("", "", "")
    if end == Status.PASSED and detail == nonce.decode() and status == 0:
        return Outcome(status=Status.PASSED, detail="", layers=layers)
    if status == sandbox_child.EXIT_TIMEOUT:
        return Outcome(status=Status.TIMEOUT, detail="past its time", layers=layers)
    if status == sandbox_child.EXIT_MEMORY:
        return Outcome(status=Status.OUT_OF_MEMORY, detail="MemoryError", layers=layers)
    if end in (Status.FAILED, Status.REFUSED):
        return Outcome(status=Status(end), detail=detail, layers=layers)
    return Outcome(status=Status.FAILED, detail=_unreported(status, last_line), layers=layers)


def _unreported(status: int, last_line: str) -> str:
    """What to say of a program that ended without a report."""
    if status > sandbox_child.EXIT_SIGNAL:
        with suppress(ValueError):
            name = signal.Signals(status - sandbox_child.EXIT_SIGNAL).name
            return f"ended by {name}" + (f": {last_line}" if last_line else "")
    return last_line or "the program's process ended before its tests did"


def _tail(errors: IO[bytes]) -> str:
    """The last line that is not blank."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - TAIL_BYTES))
    lines = errors.read(TAIL_BYTES).decode("utf-8", "replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # folders in folders
        subprocess.run(["rm", "-rf", "--", str(folder)], check=False, capture_output=True)
