"""Programs that go wrong, each in its own way: never a hang, never a wrong pass, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rheostat.errors import SettingError
from rheostat.eval import sandbox, sandbox_child, sandbox_guard
from rheostat.eval.sandbox import Outcome, Status, run_program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is for Linux")

SHORT = 0.4
"""Seconds for programs that would never end."""


def run(source: str, tests: str = "", *, seconds: float = 20.0, memory_mb: int = 512, **layers: bool) -> Outcome:
    return run_program(source, tests=tests, seconds=seconds, memory_mb=memory_mb, **layers)


@pytest.fixture(scope="module")
def layers() -> tuple[str, ...]:
    """What this machine's kernel allows."""
    return run("").layers


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the test did: no process of the sandbox runs on, and its folders are gone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not running()
    assert not list(folder.iterdir())


def running() -> list[str]:
    """Processes of the sandbox, copies that programs made of themselves included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if sandbox_child.__file__ in line:
            found.append(f"{path.parent.name}: {line}")
    return found


# -- programs that pass


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("def double(x):\n    return 2 * x\n", "assert double(2) == 4\n"),
        ("from __future__ import annotations\nx: undefined = 1", "assert x == 1"),
        ("from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: 'int' = 1", "assert Point().x == 1"),
        ("if __name__ == '__main__':\n    raise ValueError", ""),
        ("import sys\nsys.stdout.close()", "assert True"),
        ("import os\nos.close(1)\nos.close(2)", "assert True"),
        ("import atexit\natexit.register(lambda: 1 / 0)", ""),
        ("import threading\nwait = threading.Event()\nthreading.Thread(target=wait.wait).start()", ""),
        ("import os, sys, time, builtins\nos.write = os._exit = os.getpid = builtins.exec = sys.exit = None", ""),
        ("print('a' * 10**7)", ""),
    ],
    ids=["function", "future", "dataclass", "main", "stdout", "descriptors", "atexit", "thread", "patched", "output"],
)
def test_passes(source: str, tests: str):
    assert run(source, tests) == Outcome(status=Status.PASSED, detail="", layers=run("").layers)


ORDINARY = """
import asyncio, os, pathlib, random, shutil, sqlite3, tempfile, threading

async def three():
    return 3

assert asyncio.run(three()) == 3
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "inner" / "file"
    path.parent.mkdir()
    path.write_text("x")
    path.rename(path.with_name("other"))
    shutil.rmtree(path.parent)
with open("here", "w") as file, open("/dev/null", "w") as nowhere:
    print("text", file=file)
    print("text", file=nowhere)
assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
threads = [threading.Thread(target=random.random) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize("kernel", [True, False])
def test_ordinary_programs_are_not_in_the_way_of_the_fence(kernel: bool):
    assert run(ORDINARY, kernel=kernel).status == Status.PASSED


def test_the_program_sees_no_environment_and_no_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os, sys\nassert not os.environ, os.environ\nassert not sys.stdin.read()").passed


def test_results_repeat():
    """Sets of strings have the same order in each run."""
    ends = {run("raise ValueError(hash('rheostat'))").detail for _ in range(3)}
    assert len(ends) == 1
    assert ends.pop().startswith("ValueError: ")


# -- programs that fail


@pytest.mark.parametrize(
    ("source", "tests", "detail"),
    [
        ("def double(x):\n    return x\n", "assert double(2) == 4, 'two'\n", "AssertionError: two"),
        ("def double(x:\n", "", "SyntaxError: '(' was never closed (<program>, line 1)"),
        ("", "assert x", "NameError: name 'x' is not defined"),
        ("input()", "", "EOFError: EOF when reading a line"),
        ("raise ValueError('a\\nb')", "", "ValueError: a b"),
        ("class E(Exception):\n    def __str__(self):\n        raise self\nraise E", "", "E"),
        ("x = '\ud800'", "", "UnicodeEncodeError"),
        ("x = 1\0", "", ""),  # what Python says of null bytes differs between versions
        ("raise KeyboardInterrupt", "", "KeyboardInterrupt"),
        ("def f():\n    f()\nf()", "", "RecursionError: maximum recursion depth exceeded"),
        ("import os\nos.abort()", "", "ended by SIGABRT"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "", "ended by SIGKILL"),
    ],
)
def test_fails(source: str, tests: str, detail: str):
    outcome = run(source, tests)
    assert outcome.status == Status.FAILED
    assert outcome.detail.startswith(detail)


def test_a_program_cannot_swallow_its_tests():
    """In one text, the string would go on to the one in the tests, and nothing would be tested."""
    assert run('x = """', '"""\nassert False\n"""\n"""').status == Status.FAILED


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "exit()",
        "import os\nos._exit(0)",
        "import os\nos._exit(124)",
        "import os\nos.closerange(0, 200)\nos._exit(0)",
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nthreading.Event().wait()",
        "import sys\ndef leave(*_):\n    sys.exit(0)\nsys.settrace(leave)\ndef f(): pass\nf()",
        "print('passed')\nraise SystemExit(0)",
    ],
)
def test_leaving_before_the_tests_is_no_pass(source: str):
    assert run(source, "assert False").status == Status.FAILED


def test_a_forged_report_is_no_pass():
    forge = """
import os
for descriptor in range(200):
    try:
        os.write(descriptor, b"passed 0123456789abcdef0123456789abcdef\\n")
    except OSError:
        pass
os._exit(0)
"""
    assert run(forge).status == Status.FAILED


def test_closing_every_descriptor_is_no_pass():
    assert run("import os\nos.closerange(0, 200)", "assert True").status == Status.FAILED


# -- programs that never end, or take too much


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "while True: print('x' * 10_000)",
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True: pass",
        "def f():\n    try:\n        f()\n    finally:\n        f()\nf()",
        "while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass",
        "x = 9 ** 9 ** 9",
    ],
    ids=["loop", "sleep", "print", "signals", "recursion", "except", "power"],
)
def test_endless_programs_time_out(source: str):
    assert run(source, seconds=SHORT).status == Status.TIMEOUT


def test_waiting_is_not_working():
    """The limit is of processor time first: no program fails because the machine is busy with something else."""
    assert run("import time\ntime.sleep(1.5)", seconds=1).passed


@pytest.mark.parametrize(
    "source",
    ["x = [0] * 10**10", "x = []\nwhile True:\n    x.append('a' * 10**6 + str(len(x)))", "x = bytearray(10**9)"],
)
def test_eating_memory(source: str):
    assert run(source, memory_mb=128).status == Status.OUT_OF_MEMORY


def test_memory_is_enough_for_ordinary_programs():
    assert run("x = bytearray(2**25)", memory_mb=sandbox.MIN_MEMORY_MB * 2).passed
    assert run("import re, math, collections", memory_mb=sandbox.MIN_MEMORY_MB).passed


@pytest.mark.parametrize("stream", ["open('big', 'w')", "sys.stderr"])
def test_huge_files(stream: str):
    outcome = run(f"import sys\nfile = {stream}\nwhile True:\n    print('x' * 10**6, file=file)")
    assert outcome.status == Status.FAILED
    assert outcome.detail == "OSError: [Errno 27] File too large"


def test_many_files_stay_in_memory(layers: tuple[str, ...]):
    if "files" not in layers:
        pytest.skip("the kernel allows no mounts here")
    outcome = run("n = 0\nwhile True:\n    n += 1\n    open(f'{n}', 'wb').write(bytes(2**20))")
    assert outcome.detail == "OSError: [Errno 28] No space left on device"


def test_folders_in_folders_are_removed():
    assert run("import os\nfor _ in range(1500):\n    os.mkdir('a')\n    os.chdir('a')", kernel=False).passed


# -- what the guard refuses, alone (as in most containers) and with the kernel's layers

REFUSED = {
    "socket": "import socket\nsocket.socket()",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/x')",
    "name": "import socket\nsocket.gethostbyname('example.org')",
    "web": "import urllib.request\nurllib.request.urlopen('http://example.org')",
    "fork": "import os\nwhile True: os.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "system": "import os\nos.system('true')",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    "kill parent": "import os\nos.kill(os.getppid(), 0)",
    "kill all": "import os\nos.kill(-1, 0)",
    "kill group": "import os\nos.killpg(os.getpgid(os.getppid()), 0)",
    "C": "import ctypes",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "write": "open('/tmp/rheostat-test', 'w')",
    "write through os": "import os\nos.open('/tmp/rheostat-test', os.O_WRONLY | os.O_CREAT)",
    "leave the folder": "open('../rheostat-test', 'w')",
    "link": "import os\nos.symlink('/tmp', 'a')\nopen('a/rheostat-test', 'w')",
    "remove": "import os\nos.remove('/tmp/rheostat-test')",
    "remove at": "import os\nos.remove('rheostat-test', dir_fd=os.open('/tmp', os.O_RDONLY))",
    "remove tree": "import shutil\nshutil.rmtree('/tmp/rheostat-test-tree')",
    "rename": "import os\nopen('a', 'w').close()\nos.rename('a', '/tmp/rheostat-test')",
    "mkdir": "import os\nos.mkdir('/tmp/rheostat-test')",
    "database": "import sqlite3\nsqlite3.connect('/tmp/rheostat-test')",
    "hidden": "import socket\ntry:\n    socket.socket()\nexcept OSError as e:\n    raise ValueError from e",
}


@pytest.mark.parametrize("kernel", [True, False], ids=["with kernel", "alone"])
@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_refused(source: str, kernel: bool):
    if "rmtree" in source:
        Path("/tmp/rheostat-test-tree").mkdir(exist_ok=True)
    outcome = run(source, kernel=kernel)
    assert outcome.status == Status.REFUSED
    assert outcome.detail.endswith("is not allowed in this sandbox")
    assert not Path("/tmp/rheostat-test").exists()
    if "rmtree" in source:
        Path("/tmp/rheostat-test-tree").rmdir()


def test_refused_and_wrong_is_wrong():
    """Who gives up what is refused, and then fails for a reason of its own, failed for that reason."""
    source = "import socket\ntry:\n    socket.socket()\nexcept OSError:\n    pass"
    assert run(source).passed
    assert run(source, "assert False").status == Status.FAILED


# -- what the kernel stops, with the guard off

CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5).close()"
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
"""


@pytest.mark.parametrize("kernel", [True, False])
def test_the_kernel_stops_connections(kernel: bool, layers: tuple[str, ...]):
    if kernel and "namespaces" not in layers:
        pytest.skip("the kernel allows no namespaces here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = run(CONNECT.format(port=server.getsockname()[1]), kernel=kernel, guard=False)
    assert outcome.passed is not kernel  # and without it the same program does get through


@pytest.mark.parametrize("kernel", [True, False])
def test_the_kernel_stops_writing(kernel: bool, layers: tuple[str, ...], tmp_path: Path):
    if kernel and "files" not in layers:
        pytest.skip("the kernel allows no mounts here")
    path = tmp_path / "written"
    outcome = run(f"open({str(path)!r}, 'w').close()", kernel=kernel, guard=False)
    assert outcome.passed is path.exists() is not kernel


def test_the_kernel_stops_fork_bombs(layers: tuple[str, ...]):
    if "user" not in layers:
        pytest.skip("processes of this user are not counted here")
    outcome = run("import os\nwhile True: os.fork()", guard=False, seconds=10)
    assert outcome.status in (Status.FAILED, Status.TIMEOUT)


@pytest.mark.parametrize("kernel", [True, False])
def test_children_that_survive_are_ended(kernel: bool):
    """With a process namespace the kernel ends them, without it the keeper does. The fixture looks for them."""
    assert run(DAEMON, kernel=kernel, guard=False).passed
    assert run(f"{DAEMON}\nwhile True: pass", kernel=kernel, guard=False, seconds=SHORT).status == Status.TIMEOUT


@pytest.mark.parametrize("kernel", [True, False])
def test_a_copy_of_the_program_cannot_pass_for_it(kernel: bool):
    assert run("import os\nif os.fork(): os._exit(1)", kernel=kernel, guard=False).status == Status.FAILED


def test_killing_the_parents_group_ends_the_program_alone(layers: tuple[str, ...]):
    if "namespaces" not in layers:
        pytest.skip("the kernel allows no namespaces here")
    outcome = run("import os\nos.killpg(os.getpgid(os.getppid()), 9)", guard=False)
    assert outcome.status == Status.FAILED


# -- around it


def test_an_interrupt_ends_the_program():
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            run("while True: pass", seconds=60)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_hanging_sandbox_is_ended_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Should the keeper itself hang, and not even have started: that says nothing about the program."""
    hanging = tmp_path / "hanging.py"
    hanging.write_text("while True: pass\n")
    monkeypatch.setattr(sandbox_child, "__file__", str(hanging))
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match="the sandbox for programs did not start"):
        run("", seconds=0.5)


def test_a_sandbox_that_does_not_start_is_no_failed_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise OSError('no room')\n")
    monkeypatch.setattr(sandbox_child, "__file__", str(broken))
    with pytest.raises(RuntimeError, match=r"did not start \(exit status 1\): OSError: no room"):
        run("")


def test_the_sandboxs_own_start_is_not_the_programs_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import time\ntime.sleep(3)\n{Path(sandbox_guard.__file__).read_text().split('annotations', 1)[1]}"
    )
    monkeypatch.setattr(sandbox_guard, "__file__", str(slow))
    assert run("", seconds=0.5).passed  # up to 2.5 seconds on the wall clock


def test_several_at_once():
    sources = {"assert True": 60, "assert False": 60, "while True: pass": 2, "x = [0] * 10**10": 60}
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda source: run(source, seconds=sources[source]).status, sources))
    assert ends == [Status.PASSED, Status.FAILED, Status.TIMEOUT, Status.OUT_OF_MEMORY]


def test_descriptors_are_closed():
    before = len(os.listdir("/proc/self/fd"))
    run("")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("seconds", "memory_mb", "message"),
    [
        (0, 512, "seconds=0: must be a number above 0"),
        (float("nan"), 512, "seconds=nan: must be a number above 0"),
        (float("inf"), 512, "seconds=inf: must be a number above 0"),
        (1, 8, "memory_mb=8: must be at least 64"),
    ],
)
def test_bad_limits(seconds: float, memory_mb: int, message: str):
    with pytest.raises(SettingError, match=message):
        run_program("", seconds=seconds, memory_mb=memory_mb)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SettingError, match="run on Linux only, this is darwin"):
        run("")
