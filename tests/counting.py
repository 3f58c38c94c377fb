"""What a forward pass really multiplies and reads, counted from outside: by part, on any model.

Products come from `torch`'s own FLOP counter, which knows the module that ran each of them. It misses fused attention
on a CPU, so set `attn_implementation="eager"` on the model. Reads come from the operands: a weight counts once a pass,
by the storage it lies in and how much of it was used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rheostat.adapted import Adapted
from rheostat.geometry import Geometry

PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1)}
"""Operator -> places of its two factors."""


@dataclass
class Counted:
    """FLOPs by part, and bytes of weights, embedding rows and cache, of what ran inside `counting`."""

    flops: dict[str, int] = field(default_factory=dict)
    weight_bytes: int = 0
    """Of all matrices multiplied, each counted once."""
    row_bytes: int = 0
    """Of embedding rows looked up."""


class Reads(TorchDispatchMode):
    """Notes which elements of the model's parameters are operands of a product or looked up."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
        self.used: dict[int, torch.Tensor] = {}
        """Storage -> marks of the elements that a product read."""
        self.row_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        if name in PRODUCTS and out.numel():  # a product of no rows reads nothing
            for place in PRODUCTS[name]:
                self._mark(args[place])
        if name == "aten::embedding":
            self.row_bytes += out.numel() * out.element_size()
        return out

    def _mark(self, operand: torch.Tensor) -> None:
        storage = operand.untyped_storage()
        if storage.data_ptr() in self.parameters:
            length = storage.nbytes() // operand.element_size()
            marks = self.used.setdefault(storage.data_ptr(), torch.zeros(length, dtype=torch.bool))
            marks.as_strided(operand.shape, operand.stride(), operand.storage_offset()).fill_(True)

    @property
    def weight_bytes(self) -> int:
        return sum(int(marks.sum()) * self.parameters[key].element_size() for key, marks in self.used.items())


@contextmanager
def counting(adapted: Adapted) -> Iterator[Counted]:
    """Count the one forward pass inside the block; the figures are there after it."""
    counted = Counted()
    reads, products = Reads(adapted.model), FlopCounterMode(display=False)
    with torch.no_grad(), products, reads:
        yield counted
    by_module = {name: sum(ops.values()) for name, ops in products.get_flop_counts().items()}
    counted.flops = _by_part(by_module)
    counted.weight_bytes, counted.row_bytes = reads.weight_bytes, reads.row_bytes


def _by_part(by_module: dict[str, int]) -> dict[str, int]:
    def ending(*ends: str) -> int:
        return sum(number for name, number in by_module.items() if name.endswith(ends))

    projections = ending(*(f".self_attn.{name}_proj" for name in ("q", "k", "v", "qkv", "o")))
    router = ending(".mlp.router")
    return {
        "attention": projections,
        "scores": ending(".self_attn") - projections,
        "ffn": ending(".mlp") - router,
        "router": router,
        "head": ending(".lm_head"),
    }


def square_scores(geometry: Geometry, num_rows: int, num_tokens: int, past: int) -> int:
    """FLOPs of eager attention, which multiplies every query with every key that the cache hands out: keys to come
    and padding as well. A layer with a window keeps one key less than the window, and all new ones."""
    windows = geometry.windows or (0,) * geometry.num_layers
    keys = sum((min(past, window - 1) if window else past) + num_tokens for window in windows)
    return 4 * geometry.num_heads * geometry.head_dim * num_rows * num_tokens * keys
