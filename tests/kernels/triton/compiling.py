"""Compile the kernels for a GPU of compute capability 9.0, on a machine that has none.

Run by `test_compiling.py` in a process of its own, without Triton's interpreter. Calls go through the kernels' Python
side with CPU tensors; what would launch compiles instead. Prints one JSON object: kernel -> lists of instructions.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rheostat.kernels.triton import (
    DeviceMatrix,
    NestedWeights,
    NibbleBody,
    attention,
    ffn_few,
    ffn_many,
    language,
    pack,
    planes,
    products,
)

NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
ACCESS = re.compile(r"ld\.global[\w.:]*|cp\.async\.\w+\.shared\.global|wgmma\.mma_async|mma\.sync")

KERNELS = {"_few_rows", "_fused", "_add_up", "_gate_up", "_down", "_stretch", "_combine"}
"""What is launched from Python."""

found: dict[str, list[dict[str, int]]] = {}


class Compiled:
    """Stands where a kernel was, and compiles it for each launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | constants
        signature, fixed, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = given[name]
            if self.kernel.params[place].is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], fixed[place,] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = NAMES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
                if isinstance(value, torch.Tensor) or value % 16 == 0:
                    attributes[place,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, fixed, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        counts: dict[str, int] = {"shared": done.metadata.shared, "stack": stack_bytes(done.asm["cubin"])}
        for one in ACCESS.findall(done.asm["ptx"]):
            counts[one] = counts.get(one, 0) + 1
        found.setdefault(self.kernel.__name__, []).append(counts)


def stack_bytes(binary: bytes) -> int:
    """Of each thread: what did not fit into registers. Triton's own tools tell."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max(int(one) for one in re.findall(r"STACK:(\d+)", told.stdout + told.stderr))


def replace_kernels() -> None:
    language.is_available = lambda device: True
    for module in (products, ffn_few, ffn_many, attention, planes):
        for name in KERNELS & set(vars(module)):
            setattr(module, name, Compiled(getattr(module, name)))


def main() -> None:
    replace_kernels()
    half, width, inner = torch.bfloat16, 128, 256
    for format in ("bf16", "int8", "int4"):
        w = pack(torch.randn(inner, width), format)
        down: DeviceMatrix = pack(torch.randn(width, inner), format)
        weights = NestedWeights.of(w, w, [down], [None], [64, 128, inner])
        for rows in (1, 8, 64):
            x = torch.randn(rows, width).to(half)
            if rows < 64:
                products.few_rows(x, w)
            weights.run(x, torch.zeros(rows, dtype=torch.int64))
        downs = [pack(torch.randn(width, size), format) for size in (64, 128, inner)]
        own = NestedWeights.of(w, w, downs, [torch.zeros(width)] * 3, [64, 128, inner])
        own.run(torch.randn(64, width).to(half), torch.zeros(64, dtype=torch.int64))
    counts = torch.zeros(2, dtype=torch.int32)
    cache = [torch.zeros(2, 8, 512, 64, dtype=half) for _ in range(2)]
    attention.decode_attention(torch.zeros(2, 32, 64, dtype=half), *cache, counts, counts, scale=0.1)
    plane = torch.zeros(2, 8, 256, 32, dtype=torch.uint8)
    spread = torch.zeros(2, 8, 2, 64, dtype=half), torch.zeros(2, 8, 256, 1, dtype=half)
    bodies = [NibbleBody(plane, plane, one, one, group) for one, group in zip(spread, (128, 64), strict=True)]
    for bits in (4, 8):
        q = torch.zeros(2, 1, 32, 64, dtype=half)
        planes.planes_attention(q, *bodies, *cache, counts, counts, scale=0.1, bits=bits)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
