from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "gpu_table.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny run is for Triton's interpreter")
def test_every_part_of_the_table_runs(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--tiny", "--minutes", "60", "--out", str(out)]
    settings = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["left_out"] == []
    assert max(found["checks"].values()) < 1e-4
    sides = {(row["batch"], row["side"]) for row in found["decode"]}
    ours = {f"ours {format} dial {dial}" for format in ("bf16", "int8", "int4") for dial in (1.0, 0.6)}
    assert sides == {(batch, side) for batch in (1, 8) for side in (*ours, "transformers")}
    read = {(row["batch"], row["side"]): row["bytes"] for row in found["decode"]}
    assert read[1, "ours int4 dial 1.0"] < read[1, "ours int8 dial 1.0"] < read[1, "ours bf16 dial 1.0"]
    assert read[1, "ours bf16 dial 0.6"] < read[1, "ours bf16 dial 1.0"]
    flops = {row["side"]: row["flops"] for row in found["prefill"]}
    assert flops["ours grouped dial 0.6"] < flops["ours grouped dial 1.0"] == flops["transformers compiled"]
    for part in ("decode", "prefill", "kernels"):
        assert all(row["ms"] > 0 for row in found[part])


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 2
    assert "device" in done.stderr
