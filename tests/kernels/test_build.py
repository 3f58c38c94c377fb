from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rheostat import kernels
from rheostat.errors import SettingError
from rheostat.folders import NOTICE
from rheostat.kernels import build

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no compiler")

TRY = """
import torch
from rheostat.kernels import few_rows, library, pack
torch.set_num_threads(2)
torch.manual_seed(0)
w, x = torch.randn(33, 70), torch.randn(5, 70)
for format in ("fp32", "int8", "int4"):
    packed = pack(w, format)
    y, wanted = few_rows(x, packed), x @ packed.unpack().T
    assert (y - wanted).norm() < 0.03 * wanted.norm(), format
print(None if library() is None else library().rheostat_level())
"""

FORK = """
import os, sys, torch
from rheostat.kernels import few_rows, pack
torch.set_num_threads(2)
w, x = pack(torch.randn(640, 576), "bf16"), torch.randn(1, 576)
wanted = few_rows(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(few_rows(x, w), wanted) else 1)
status = os.waitpid(child, 0)[1]
assert torch.equal(few_rows(x, w), wanted)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)


def test_plain_by_request(monkeypatch):
    monkeypatch.setenv("RHEOSTAT_KERNELS", "plain")
    assert kernels.library() is None
    w = kernels.pack(torch.eye(3), "fp32")
    assert torch.equal(kernels.few_rows(torch.ones(1, 3), w), torch.ones(1, 3))


def test_bad_settings_are_named(monkeypatch):
    monkeypatch.setenv("RHEOSTAT_KERNELS", "fast")
    with pytest.raises(SettingError, match="RHEOSTAT_KERNELS='fast'"):
        kernels.library()
    monkeypatch.setenv("RHEOSTAT_KERNELS_LEVEL", "avx10")
    with pytest.raises(SettingError, match="RHEOSTAT_KERNELS_LEVEL='avx10'"):
        build.machine_level()


def test_without_a_compiler_the_twins_serve_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._library.cache_clear()
    try:
        assert kernels.library() is None
        assert kernels.library() is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        monkeypatch.setenv("RHEOSTAT_KERNELS", "native")
        with pytest.raises(SettingError, match="no-such-compiler"):
            kernels.library()
    finally:
        build._library.cache_clear()


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(SettingError, match="CXX="):
        build.build("portable", tmp_path)
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a compiler of a shell script."""

    def write(body: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return write


def test_a_compiler_may_have_arguments(monkeypatch, tmp_path, script, caplog):
    """The script makes the file that it is told to (the last argument) and puts its first argument into it."""
    compiler = script('[ "$2" = --version ] && exit; eval "echo $1 > \\"\\${$#}\\""')
    monkeypatch.setenv("CXX", f"'{compiler}' --quick")
    caplog.set_level(NOTICE)
    assert build.build("portable", tmp_path / "cache").read_text() == "--quick\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"compiling native kernels for this machine, once; they go to {tmp_path / 'cache' / 'kernels'}"
    ]
    build.build("portable", tmp_path / "cache")
    assert len(caplog.records) == 1
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(
        SettingError, match="^CXX='no-such-compiler -x': must be a command that is on the path, or unset"
    ):
        build.find_compiler()
    monkeypatch.setenv("CXX", "g++ 'half")
    with pytest.raises(SettingError, match=r'CXX="g\+\+ .half": must be a command'):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(SettingError, match="^CXX: must be set to a C\\+\\+ compiler"):
        build.find_compiler()


def test_a_build_that_is_broken_off_takes_the_compiler_along(monkeypatch, tmp_path, script):
    note = tmp_path / "child"
    monkeypatch.setenv("CXX", str(script(f'[ "$1" = --version ] && exit\nsleep 300 &\necho $! > {note}\nwait')))
    build.digest(build.find_compiler(), [])  # asks for the version, with more time
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 1)
    with pytest.raises(subprocess.TimeoutExpired):
        build.build("portable", tmp_path)
    assert list((tmp_path / "kernels").iterdir()) == []
    child = Path(f"/proc/{note.read_text().strip()}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the compiler's child still runs")


def test_what_killed_builds_left_is_swept(monkeypatch, tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name, age in ((".a.so.old", 7200), (".a.so.new", 60), ("a.so", 7200)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(SettingError):
        build.build("portable", tmp_path)
    assert sorted(os.listdir(folder)) == [".a.so.new", "a.so"]


@pytest.mark.parametrize("home", [True, False])
def test_without_a_cache_the_kernels_are_built_for_this_process(monkeypatch, tmp_path, caplog, home):
    """Compilation stands aside: what is loaded is a name."""
    (tmp_path / "file").touch()
    if home:
        monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.setattr(build, "cache_folder", lambda: (_ for _ in ()).throw(SettingError("RHEOSTAT_CACHE=None")))
    built = []
    monkeypatch.setattr(build, "_compile", lambda command: (built.append(Path(command[-1])), (0, ""))[1])
    monkeypatch.setattr(build, "load", lambda path: path if path.is_file() else None)
    build._library.cache_clear()
    try:
        found = build._library("portable")
    finally:
        build._library.cache_clear()
    assert isinstance(found, Path)
    assert len(built) == 1
    assert not found.parent.exists()  # nothing stays
    (record,) = caplog.records
    assert "native kernels are compiled anew for each process: RHEOSTAT_CACHE=" in record.getMessage()


def test_the_name_changes_with_what_is_compiled():
    compiler = build.find_compiler()
    assert build.digest(compiler, ["-O2"]) != build.digest(compiler, ["-O3"])
    assert build.digest(compiler, ["-O3"]) == build.digest(compiler, ["-O3"])


@pytest.mark.slow
@needs_compiler
def test_a_child_of_fork_has_threads_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = run(FORK)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("level", list(build.LEVELS))
def test_every_level_that_the_machine_reaches(level):
    reached = list(build.LEVELS).index(build.machine_level())
    if list(build.LEVELS).index(level) < reached:
        pytest.skip("not reached")
    done = run(TRY, RHEOSTAT_KERNELS="native", RHEOSTAT_KERNELS_LEVEL=level)
    assert done.stdout.strip() == str(2 - list(build.LEVELS).index(level)), done.stderr
    names = ("test_native.py", "test_prompts.py", "test_reader.py", "test_settling.py")
    scripts = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *scripts]
    again = subprocess.run(command, env=os.environ | {"RHEOSTAT_KERNELS_LEVEL": level}, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-2000:]


@pytest.mark.slow
@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    command = [sys.executable, "-c", TRY]
    environment = os.environ | {"RHEOSTAT_CACHE": str(tmp_path), "RHEOSTAT_KERNELS": "native"}
    pair = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait(240) for one in pair] == [0, 0]
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("level", list(build.LEVELS))
def test_no_byte_outside_is_touched(level, tmp_path):
    """All kernels over odd shapes, on memory of exactly the size they are told, under the address sanitiser."""
    if list(build.LEVELS).index(level) < list(build.LEVELS).index(build.machine_level()):
        pytest.skip("not reached")
    program = tmp_path / "sanitised"
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-O3")]
    checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{build.NATIVE}"]
    source = str(Path(__file__).with_name("sanitised.cpp"))
    command = [*build.find_compiler(), *flags, *checks, *build.LEVELS[level].split(), source, "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all done" in done.stdout


@needs_compiler
def test_shares_follow_the_speed_of_the_threads(tmp_path):
    program = tmp_path / "balance"
    source = str(Path(__file__).with_name("balance.cpp"))
    flags = ["-std=c++17", "-O1", "-pthread", "-Wno-psabi", f"-I{build.NATIVE}"]
    subprocess.run([*build.find_compiler(), *flags, source, "-o", str(program)], check=True, timeout=240)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "all done", done.stderr
