"""Random inputs, and what results may differ by."""

from __future__ import annotations

import torch

from rheostat.kernels.triton import DeviceMatrix, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FORMATS = (("fp32", 0), ("bf16", 0), ("fp16", 0), ("int8", 0), ("int4", 32), ("int4", 64))

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
"""Relative error of a result's norm by the dtype of activations: sums in another order; weights of int4 and hidden
activations rounded to it. The interpreter cuts off where a GPU rounds to bfloat16, which doubles that error."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(*shape: int, g: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def random_matrix(num_rows: int, num_cols: int, format: str, group: int, g: torch.Generator) -> DeviceMatrix:
    """A matrix whose products have about the size of their inputs."""
    weight = torch.randn(num_rows, num_cols, generator=g) / max(num_cols, 1) ** 0.5
    return pack(weight, format, group or 32, DEVICE)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, relative to that of `b`; NaN where anything is NaN."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6))
