"""The inside of the sandbox: a script that `rheostat.eval.sandbox` starts in a process of its own.

Three processes, so that nothing the program does can stop its end:

- the launcher enters new namespaces and waits;
- the keeper, first in the new process namespace, ends the runner at the deadline, and whatever is left after it;
- the runner limits itself, gives up its rights, runs the program and reports. Beside it lies `sandbox_guard`.

Standard library only, and nothing of ours: whatever is imported here is in the program's memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import resource
import signal
import site
import stat
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

EXIT_TIMEOUT, EXIT_MEMORY, EXIT_SIGNAL = 124, 125, 128
"""Exit statuses of keeper and launcher: past the deadline, out of memory, and (added to the number) a signal."""
POLL_SECONDS = 0.01
NOBODY = 65534
FILE_BYTES = 16 * 2**20
"""The largest file that the program can write."""
FOLDER_OPTIONS = b"size=64m,nr_inodes=4096,mode=0777"
"""Of the working folder, where it can be a file system of its own."""
NUM_FILES, NUM_PROCESSES = 128, 64
"""Open files a process; processes and threads in all."""
SPARE_BYTES = 4 * 2**20
"""Given back before a report, so that there is room to write one."""

# From Linux's headers.
NEW_FILES, NEW_HOST, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 8, 36, 38
CAP_DAC_READ_SEARCH, CAP_SETGID, CAP_SETUID = 2, 6, 7
CAPABILITY_VERSION = 0x20080522
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1


def main(settings: dict[str, Any]) -> NoReturn:
    """The launcher. `settings`: the descriptors `source`, `nonce` and `report`, the limits `seconds`, `wall_seconds`
    and `memory_bytes`, which layers to try (`kernel`, `guard`), `guard_file`, and `started_by_root`."""
    libc = ctypes.CDLL(None, use_errno=True)
    layers = enter_namespaces(libc) if settings["kernel"] else []
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = os.fork()
    if keeper == 0:
        leave(lambda: keep(libc, settings, layers))
    _, status = os.waitpid(keeper, 0)
    end_descendants()
    os._exit(exit_status(status))


def leave(work: Callable[[], int]) -> NoReturn:
    """End this process with the result of `work`, or with 1 after the traceback of what it raised."""
    status = 1
    try:
        status = work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def exit_status(status: int) -> int:
    """What `waitpid` said, as an exit status that says the same."""
    code = os.waitstatus_to_exitcode(status)
    return EXIT_SIGNAL - code if code < 0 else code


def keep(libc: Any, settings: dict[str, Any], layers: list[str]) -> int:
    """The keeper: start the runner and wait for it, not longer than the program may take."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ready, started = os.pipe()  # closed where the program starts: what comes before is not its time
    runner = os.fork()
    if runner == 0:
        leave(lambda: run(libc, settings, layers, started))
    os.close(started)
    os.set_blocking(ready, False)
    deadline = math.inf  # the sandbox's own, until then, is kept outside
    result = EXIT_TIMEOUT
    while time.monotonic() < deadline:
        if deadline == math.inf and is_closed(ready):
            deadline = time.monotonic() + settings["wall_seconds"]
        pid, status, used = os.wait4(-1, os.WNOHANG)  # any: orphans of the runner end up here too
        if pid == runner:
            code = os.waitstatus_to_exitcode(status)
            # The kernel's two clocks differ: what it ends for its time may read as slightly less.
            if code < 0 and used.ru_utime + used.ru_stime >= 0.9 * settings["seconds"]:
                break  # by the limit on processor time, whatever the program did about its signal
            # Our own statuses are not the program's to give.
            result = exit_status(status) if code <= 0 or code == EXIT_MEMORY else 1
            break
        if pid == 0:
            time.sleep(POLL_SECONDS)
    if "namespaces" not in layers:
        end_descendants()
    return result  # with the first of its processes, the kernel ends all of a process namespace


def is_closed(pipe: int) -> bool:
    """Whether nobody has the other end of an empty pipe any more."""
    try:
        return not os.read(pipe, 1)
    except BlockingIOError:
        return False


def end_descendants() -> None:
    """Kill all children, and the orphans that become ours while we do."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        try:
            children = Path("/proc/thread-self/children").read_text().split()
        except OSError:  # some kernels have no such list
            return
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        time.sleep(POLL_SECONDS)


# -- layers that the kernel holds up


def enter_namespaces(libc: Any) -> list[str]:
    """Cut this process and its children off from other processes, from networks and from writing files.

    Returns:
        The names of what could be had: some kernels and containers allow none of it.
    """
    flags = NEW_FILES | NEW_HOST | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(flags) != 0:  # needs root; who is not may become root of a user namespace
        if libc.unshare(flags | NEW_USER) != 0:
            return []
        for file, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            try:
                Path(f"/proc/self/{file}").write_text(line)
            except OSError:
                break
    return ["namespaces", "files"] if make_files_read_only(libc) else ["namespaces"]


def make_files_read_only(libc: Any) -> bool:
    """Forbid writing anywhere but in the working folder, which becomes a small file system in memory."""
    folder = os.getcwd()
    if libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) != 0:
        return False
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    numbers = [ctypes.c_long(number) for number in (SYS_MOUNT_SETATTR, AT_FDCWD)]
    if libc.syscall(*numbers, b"/", ctypes.c_long(AT_RECURSIVE), attributes, ctypes.c_long(len(attributes))) != 0:
        return False
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, FOLDER_OPTIONS) != 0:
        return False
    os.chdir(folder)  # into the new one
    return True


def limit(settings: dict[str, Any], is_apart: bool) -> None:
    """Set this process's limits, for good.

    Args:
        is_apart: the program's processes are counted on their own, not together with all others of the user.
    """
    num_others = 0 if is_apart else int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, math.ceil(settings["seconds"])),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, NUM_FILES),
        (resource.RLIMIT_NPROC, NUM_PROCESSES + num_others),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
    ):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def drop_rights(libc: Any) -> bool:
    """Give up all capabilities and, where we are root, become nobody.

    Root's own processes are not counted by the limit on processes, and root may write anywhere. One right is
    kept where it is there, to read any file: the interpreter's own may be in a folder that is closed to others.

    Returns:
        Whether the process has no more rights than an ordinary user.
    """
    had = int(dict(line.split(":\t", 1) for line in status_lines())["CapEff"], 16)
    kept = had & 1 << CAP_DAC_READ_SEARCH
    is_root = os.getuid() == 0
    if is_root and had >> CAP_SETUID & 1 and had >> CAP_SETGID & 1 and (kept or is_python_public()):
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        try:
            os.chown(".", NOBODY, NOBODY)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            is_root = False
        except OSError:  # a user namespace without that user
            pass
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    sets = struct.pack("=6I", kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable; low and high half
    is_done = libc.capset(header, sets) == 0
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return is_done and not is_root


def status_lines() -> list[str]:
    """What the kernel says of this process."""
    return Path("/proc/self/status").read_text().splitlines()


def is_python_public() -> bool:
    """Whether anyone may read the interpreter's library and the installed packages."""
    paths = [Path(os.__file__), *map(Path, site.getsitepackages())]
    existing = [path.resolve() for path in paths if path.exists()]
    open_to_all = stat.S_IXOTH
    return all(folder.stat().st_mode & open_to_all for path in existing for folder in path.parents)


# -- the program


def run(libc: Any, settings: dict[str, Any], layers: list[str], started: int) -> int:
    """The runner: limits and guard, then the program, then the report. Closes `started` between them."""
    os.setsid()
    with open(settings["source"], encoding="utf-8") as file:
        parts: list[str] = json.load(file)
    is_user = drop_rights(libc) if settings["kernel"] else False
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # not before: a change of user clears it
    found = [*layers, *(["user"] if is_user else []), "limits", *(["guard"] if settings["guard"] else [])]
    # Not `__main__`: what is under that test does not run, as in the published harnesses.
    module = sys.modules["program"] = types.ModuleType("program")
    del sys.modules["ctypes"], sys.modules["_ctypes"]
    os.environ.clear()
    # What the report needs is taken now, because the program may replace anything that it can name.
    pid, getpid, read, write, leave_now = os.getpid(), os.getpid, os.read, os.write, os._exit
    execute, translate, texts = exec, compile, list(zip(("<program>", "<tests>"), parts, strict=True))
    report, nonce, spare = settings["report"], settings["nonce"], bytearray(SPARE_BYTES)
    guard, folder = load(settings["guard_file"]), os.path.realpath(os.getcwd())
    limit(settings, is_apart="namespaces" in layers or (is_user and settings["started_by_root"]))
    write(report, f"layers {' '.join(found)}\n".encode())  # from here on, what goes wrong is the program's
    if settings["guard"]:
        sys.addaudithook(guard.make_guard(folder))
    os.close(started)
    try:
        for name, text in texts:
            execute(translate(text, name, "exec", dont_inherit=True), module.__dict__)
        if getpid() != pid:  # a copy that the program made of itself
            leave_now(1)
        # The nonce was in nobody's memory before.
        write(report, b"passed " + read(nonce, 64) + b"\n")
        leave_now(0)  # now: what the program left to be done at exit, or in threads, is no test
    except MemoryError:
        del spare
        if getpid() == pid:
            write(report, b"out-of-memory MemoryError\n")
        leave_now(EXIT_MEMORY)
    except BaseException as error:
        del spare
        if getpid() == pid:
            write(report, describe(error, guard.REFUSALS).encode("utf-8", "replace"))
        leave_now(1)
    return 1


def load(path: str) -> Any:
    """The module in a file, which no program finds among the loaded ones."""
    spec = importlib.util.spec_from_file_location("sandbox_guard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(error: BaseException, refusals: tuple[type[BaseException], ...]) -> str:
    """A line for the report: the kind of end, and the last line that Python would print."""
    if isinstance(error, SystemExit):
        return "failed the program left before its tests ended\n"
    try:
        message = str(error)
    except BaseException:  # the program's own class may do anything
        message = ""
    last = " ".join(f"{type(error).__name__}: {message}".rstrip(": ").split())[:300]
    cause: BaseException | None = error
    for _ in range(20):
        if isinstance(cause, refusals):
            return f"refused {cause}\n"
        cause = (cause.__cause__ or cause.__context__) if cause is not None else None
    return f"failed {last}\n"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
