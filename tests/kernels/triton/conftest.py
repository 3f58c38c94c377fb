"""The kernels run on the GPU if there is one, else in Triton's interpreter (`tests/conftest.py` asks for it)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs Triton, where it is missing."""
    missing = importlib.util.find_spec("triton") is None
    for item in items:
        if missing and "/kernels/triton/" in str(item.path) and "without_triton" not in item.name:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed"))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that nobody has written to reads as NaN, so a kernel that leaves a place out, or reads one, is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
