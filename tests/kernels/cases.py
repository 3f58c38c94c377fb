"""Random inputs for the kernels, and what their results may differ by."""

from __future__ import annotations

import torch

from rheostat.kernels import PackedMatrix, pack

FORMATS = (("fp32", 0), ("bf16", 0), ("fp16", 0), ("int8", 0), ("int4", 32), ("int4", 64))
"""Every format with every group."""

TOLERANCE = {"fp32": 2e-6, "fp16": 2e-6, "bf16": 8e-3, "int8": 3e-2, "int4": 3e-2}
"""Relative error of a product's norm: sums in another order; activations rounded to bfloat16, or to bytes."""


def random_matrix(num_rows: int, num_cols: int, format: str, group: int, generator: torch.Generator) -> PackedMatrix:
    """A packed random matrix whose products have about the size of their inputs."""
    weight = torch.randn(num_rows, num_cols, generator=generator) / max(num_cols, 1) ** 0.5
    return pack(weight, format, group or 32)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, relative to that of `b`."""
    return float((a - b).norm() / b.norm().clamp(min=1e-6))
