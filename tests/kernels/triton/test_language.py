from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.kernels.triton import check_device, language


def test_without_triton_it_imports_and_says_what_is_missing():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from rheostat.kernels.triton import few_rows, is_available, pack
assert not is_available(torch.device("cuda"))
try:
    few_rows(torch.ones(1, 8), pack(torch.ones(4, 8), "fp32"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "kernels='triton': must be installed: pip install 'rheostat[gpu]'", done.stderr


def test_devices():
    check_device(torch.device("cpu" if language.IS_INTERPRETED else "cuda"))
    with pytest.raises(SettingError, match="device='meta': must be"):
        check_device(torch.device("meta"))


def test_powers():
    assert [language.next_power(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert language.next_power(3, 16) == 16
