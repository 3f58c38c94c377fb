"""Sharing work; and two real processes, which must score as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rheostat.eval.ranks import Ranks, join

TASKS = ("hellaswag", "lambada_openai", "wikitext", "boolq")


def test_shares_cover_everything_once():
    items = list(range(11))
    shares = [Ranks(index, 3).share(items) for index in range(3)]
    assert sorted(one for share in shares for one in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks().share(items) == items


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join()
    assert ranks == Ranks(0, 1)
    assert ranks.gather({"x": 1}) == [{"x": 1}]
    assert ranks.device("cuda") == "cuda"
    ranks.close()


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [Ranks(7, 8).device(name) for name in ("cuda", "cpu", "cuda:1")] == ["cuda:3", "cpu", "cuda:1"]


@pytest.mark.slow
def test_two_processes_score_as_one(tiny_model_folder: Path, data_folder: Path, tmp_path: Path):
    def report(name: str, *launcher: str) -> list[dict]:
        out = tmp_path / name
        command = [
            "eval",
            str(tiny_model_folder),
            "--tasks=" + ",".join(TASKS),
            "--task-data",
            str(data_folder),
            "--batch-tokens",
            "200",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "rheostat", *command, "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written:") == 1  # one process speaks for both
        tasks = json.loads((out / "report.json").read_text())["tasks"]
        for row in tasks:
            assert row.pop("seconds") > 0
        return tasks

    launch = ("accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
    both = report("both", *launch, "--dynamo_backend=no", "-m")
    alone = report("alone")
    assert both == alone
    assert {task["task"]: task["rows"] for task in both} == dict(zip(TASKS, [8, 6, 2, 4], strict=True))
