"""What the interpreter cannot show: that the kernels compile for a GPU, and how they read memory there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_and_read_in_wide_pieces(tmp_path):
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.kernels.triton.compiling"]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"_few_rows", "_fused", "_add_up", "_gate_up", "_down", "_stretch", "_combine"}
    for name, versions in found.items():
        for counts in versions:
            assert counts["stack"] <= 16, f"{name} spills registers: {counts}"
            assert counts["shared"] < 227 << 10
            is_wide = counts.get("cp.async.cg.shared.global", 0) + counts.get("ld.global.v4.b32", 0)
            assert is_wide or name == "_combine", f"{name} reads in small pieces: {counts}"
    for name in ("_gate_up", "_down"):
        assert all(counts.get("wgmma.mma_async") for counts in found[name]), "many rows belong on the matrix units"
