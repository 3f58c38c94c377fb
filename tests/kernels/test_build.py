from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from rheostat import kernels
from rheostat.errors import SettingError
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
    command = [build.find_compiler(), *flags, *checks, *build.LEVELS[level].split(), source, "-o", str(program)]
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
    subprocess.run([build.find_compiler(), *flags, source, "-o", str(program)], check=True, timeout=240)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "all done", done.stderr
