"""The layer of the sandbox that works inside Python: what a program may not ask the interpreter for.

Loaded by `sandbox_child` in the program's process. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Refused(PermissionError):
    """The program asked for something that it may not have."""


class RefusedImport(ImportError):
    """The same for a module. An `ImportError`, as where it is not built: many programs do without."""


REFUSALS = (Refused, RefusedImport)

PROCESS_EVENTS = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")
LIMIT_EVENTS = ("resource.prlimit", "resource.setrlimit", "sqlite3.enable_load_extension", "subprocess.Popen")
PATH_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.removexattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
"""Event -> where among its arguments the paths are that change, each with its `dir_fd`."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def make_guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses sockets, processes, signals to others, C libraries, and writing outside `folder`."""
    no_family = object()
    unix = 1  # AF_UNIX: event loops wake themselves through a pair of these; connecting one is refused below
    realpath, readlink, getpid, fsdecode, isabs = os.path.realpath, os.readlink, os.getpid, os.fsdecode, os.path.isabs

    def is_inside(path: Any, dir_fd: Any = None) -> bool:
        if isinstance(path, int):
            path = readlink(f"/proc/self/fd/{path}")
        path = fsdecode(path)
        if dir_fd not in (None, -1) and not isabs(path):
            path = f"{readlink(f'/proc/self/fd/{dir_fd}')}/{path}"
        path = realpath(path)
        return path in (folder, "/dev/null") or path.startswith(folder + "/")

    def is_refused(event: str, args: tuple[Any, ...]) -> bool:
        kind = event.partition(".")[0]
        if event == "open":
            path, _, flags = args
            return bool(flags & WRITING) and not isinstance(path, int) and not is_inside(path)
        if kind == "socket":
            return event != "socket.__new__" or (args[1] if len(args) > 1 else no_family) != unix
        if event in PATH_EVENTS:
            pairs = ((args[at], None if fd is None else args[fd]) for at, fd in PATH_EVENTS[event])
            return not all(is_inside(path, dir_fd) for path, dir_fd in pairs)
        if event in ("os.kill", "os.killpg"):
            return args[0] != getpid()
        if event == "sqlite3.connect":
            return args[0] != ":memory:" and not is_inside(args[0])
        return kind == "ctypes" or event in PROCESS_EVENTS or event in LIMIT_EVENTS

    def guard(event: str, args: tuple[Any, ...]) -> None:
        if event == "import" and args[0] in ("ctypes", "_ctypes"):
            raise RefusedImport(f"{args[0]} is not allowed in this sandbox", name=args[0])
        if is_refused(event, args):
            raise Refused(f"{event} is not allowed in this sandbox")

    return guard
