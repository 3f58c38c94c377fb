"""Peak memory: of this process by what /proc says, of a side in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rheostat.bench import memory
from rheostat.bench.sides import SideSpec
from tests.tiny import tiny_windows


def test_the_peak_is_above_what_is_held_and_can_begin_anew():
    before = memory.resident(memory.NOW)
    block = torch.ones(30_000_000)
    assert memory.resident(memory.NOW) - before > 100_000_000
    del block
    assert memory.resident(memory.PEAK) - memory.resident(memory.NOW) > 100_000_000
    if memory.forget_peak():
        assert memory.resident(memory.PEAK) - memory.resident(memory.NOW) < 20_000_000


def test_without_proc_the_system_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from_proc = memory.resident(memory.PEAK)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none" / "none")
    assert not memory.forget_peak()
    assert memory.resident(memory.PEAK) > from_proc / 4


@pytest.mark.slow
def test_a_side_in_its_own_process(tiny_model_folder: Path):
    spec = SideSpec(kind="stock", model=str(tiny_model_folder), dtype="float32")
    ballast = torch.ones(200_000_000)  # 800 MB of ours must not be counted as the side's
    found = memory.measure_memory(spec, tiny_windows(1, 16), 4, 1)
    assert 50e6 < found["loaded_bytes"] <= found["peak_bytes"] < memory.resident(memory.NOW)
    assert ballast.numel()
    assert found["of"] == "process"


def test_a_side_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Done:
        returncode, stdout, stderr = 1, "", "Traceback\nSettingError: model='none': must be there\n"

    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: Done)
    found = memory.measure_memory(SideSpec(kind="stock", model="none"), tiny_windows(1, 4), 2, 1)
    assert found == {"error": "SettingError: model='none': must be there"}
    Done.stderr = ""
    found = memory.measure_memory(SideSpec(kind="stock", model="none"), tiny_windows(1, 4), 2, 1)
    assert found == {"error": "status 1"}
