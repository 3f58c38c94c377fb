"""Two processes train one model: what `accelerate launch` starts, on two CPU processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rheostat import processes
from rheostat.errors import SettingError
from rheostat.processes import Ranks


def launch(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=300, env=env)


def test_alone_there_is_nobody_to_wait_for():
    assert processes.count() == 1
    assert processes.is_main()
    parameter = torch.nn.Parameter(torch.ones(2))
    processes.average_gradients([parameter])
    assert parameter.grad is None
    with processes.main_first():
        processes.wait()


def test_shares_cover_everything_once():
    items = list(range(11))
    shares = [Ranks(index, 3).share(items) for index in range(3)]
    assert sorted(one for share in shares for one in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks().share(items) == items


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = processes.join()
    assert ranks == Ranks(0, 1)
    assert ranks.gather({"x": 1}) == [{"x": 1}]
    assert ranks.device("cuda") == "cuda"
    ranks.close()


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [Ranks(7, 8).device(name) for name in ("cuda", "cpu", "cuda:1")] == ["cuda:3", "cpu", "cuda:1"]


AVERAGE = """
import atexit, os, pathlib, sys
import torch
from rheostat import processes
def note(word, value=True):  # a file for each process: lines of two in one pipe may mix
    pathlib.Path(sys.argv[1], f"{word}-{os.environ['RANK']}").write_text(str(value))
atexit.register(lambda: note("left", not torch.distributed.is_initialized()))  # runs after what came later
processes.join(cpu=True)
mine, shared, nobody = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
shared.grad = torch.full((2,), 1.0 + 2 * processes.rank())
if processes.is_main():
    mine.grad = torch.ones(2)
processes.average_gradients([mine, shared, nobody])
assert shared.grad.tolist() == [2.0, 2.0]
assert mine.grad.tolist() == [0.5, 0.5]
assert nobody.grad is None
note("averaged")
"""


@pytest.mark.slow
def test_gradients_are_averaged(tmp_path: Path):
    (tmp_path / "average.py").write_text(AVERAGE)
    done = launch(2, tmp_path / "average.py", tmp_path)
    assert done.returncode == 0, done.stderr
    noted = {file.name: file.read_text() for file in tmp_path.glob("*-?")}
    assert noted == dict.fromkeys(("averaged-0", "averaged-1", "left-0", "left-1"), "True")


@pytest.mark.slow
def test_two_processes_train_one_model(tiny_model_folder: Path, tiny_text: Path, tmp_path: Path):
    """Half the steps with twice the rows in each; one of the two speaks and writes."""
    reports = []
    for count in (1, 2):
        out = tmp_path / str(count)
        flags = ["--data", tiny_text, "--held-out", tiny_text, "--out", out, "--json"]
        flags += [
            "--set",
            "tile=4",
            "--set",
            "router_width=8",
            "--set",
            "router_steps=10",
            "--set",
            "router_loss_share=0.5",
        ]
        flags += ["--fit", "windows=4", "--fit", "length=32", "--fit", "dial_windows=2"]
        flags += ["--train", "tokens=512", "--train", "length=32", "--train", "batch_size=2"]
        done = launch(count, "-m", "rheostat", "adapt", tiny_model_folder, *flags)
        assert done.returncode == 0, done.stderr
        printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(printed) == 1
        assert json.loads(printed[0])["provenance"]
        reports.append(json.loads((out / "rheostat.json").read_text())["report"])
        assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    one, two = (report["trained"] for report in reports)
    assert (one["steps"], two["steps"]) == (8, 4)
    assert one["tokens"] == two["tokens"] == 512


@pytest.mark.parametrize(("flag", "kind"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_a_launch_that_shares_out_the_model_is_refused(flag, kind, monkeypatch):
    monkeypatch.setenv(flag, "true")
    with pytest.raises(SettingError, match=f"{kind}: is not supported, each process holds the whole model"):
        processes.join()
    monkeypatch.setenv(flag, "false")
    assert processes.join() == Ranks()
