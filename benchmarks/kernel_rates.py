"""How fast the kernels stream weights, beside torch's own products, in one interleaved run.

    OMP_NUM_THREADS=2 python benchmarks/kernel_rates.py [--json] [--repeats 7] [--threads 2]

(Not called kernels.py: transformers looks for a package of that name, and the folder of a script comes first.)

The shapes are SmolLM2-135M's. Each case goes through so many copies of its weight that no cache holds them. GB/s counts
bytes of weights; "of read" is the share of this machine's plain read rate, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from rheostat.kernels import PackedMatrix, decode_attention, few_rows, library, nested_ffn, pack
from rheostat.kernels.memory import aligned_bytes
from rheostat.kernels.prompts import causal_attention, grouped_ffn, many_rows
from rheostat.provenance import hardware

D, F, V, HEADS, KV_HEADS, HEAD = 576, 1536, 49152, 9, 3, 64
BLOCK = 192 << 20
"""Bytes that a case goes through: far more than the caches hold."""


@dataclass(frozen=True)
class Case:
    """Something to time."""

    name: str
    run: Callable[[], object]
    num_bytes: int
    flops: int = 0


def copies(matrix: PackedMatrix) -> list[PackedMatrix]:
    """The matrix again and again, each in memory of its own, in one block."""
    count = max(1, BLOCK // matrix.data.nbytes)
    block = aligned_bytes(count * matrix.data.nbytes).view(count, *matrix.data.shape)
    block[:] = matrix.data
    return [replace(matrix, data=one) for one in block]


def product_cases(num_rows: tuple[int, ...]) -> list[Case]:
    """Products of few rows with the head [V, D], whose size hides the cost of a call from Python."""
    found = []
    weight = torch.randn(V, D) / D**0.5
    for format, group in (("fp32", 32), ("bf16", 32), ("fp16", 32), ("int8", 32), ("int4", 32), ("int4", 64)):
        matrix = pack(weight, format, group)
        many = copies(matrix)
        for rows in num_rows:
            x, out = torch.randn(rows, D), torch.empty(rows, V)
            name = f"{format}{f'/{group}' if format == 'int4' else ''} rows={rows}"
            size = sum(one.nbytes for one in many)
            action = lambda x=x, out=out, many=many: [few_rows(x, one, out=out) for one in many]  # noqa: E731
            found.append(Case(name, action, size, 2 * rows * V * D * len(many)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain = [weight.to(dtype) for _ in range(max(1, BLOCK // (V * D * dtype.itemsize)))]
        for rows in num_rows:
            x = torch.randn(rows, D).to(dtype)
            action = lambda x=x, plain=plain: [torch.nn.functional.linear(x, one) for one in plain]  # noqa: E731
            size = sum(one.nbytes for one in plain)
            name = f"torch {str(dtype).removeprefix('torch.')} rows={rows}"
            found.append(Case(name, action, size, 2 * rows * V * D * len(plain)))
    return found


def ffn_cases() -> list[Case]:
    """The nested FFN at each quarter, one row; 60 layers of it."""
    found = []
    sizes = [F // 4 * (i + 1) for i in range(4)]
    for format in ("bf16", "int4"):
        gate, up = (pack(torch.randn(F, D) / D**0.5, format) for _ in range(2))
        down = pack(torch.randn(D, F) / F**0.5, format)
        layers = [
            (replace(gate, data=a), replace(up, data=b), replace(down, data=c))
            for a, b, c in zip(*(aligned_copies(one.data, 60) for one in (gate, up, down)), strict=True)
        ]
        x = torch.randn(1, D)
        for expert, size in enumerate(sizes):
            choice = torch.tensor([expert])

            def action(choice: torch.Tensor = choice, layers: list = layers, x: torch.Tensor = x) -> None:
                for g, u, d in layers:
                    nested_ffn(x, g, u, [d], [None], sizes, choice)

            read = 2 * gate.bytes_of(num_rows=size) + down.bytes_of(num_cols=size)
            found.append(Case(f"ffn {format} {size} of {F}", action, 60 * read, 60 * 6 * D * size))
    return found


def aligned_copies(data: torch.Tensor, count: int) -> torch.Tensor:
    """[count, ...] copies."""
    block = aligned_bytes(count * data.nbytes).view(count, *data.shape)
    block[:] = data
    return block


def attention_cases(num_slots: int = 4096, layers: int = 30) -> list[Case]:
    """Attention over a long cache at batch 1, beside torch's."""
    found = []
    q = torch.randn(1, HEADS, HEAD)
    lengths, starts = torch.tensor([num_slots]), torch.tensor([0])
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = (torch.randn(layers, 1, KV_HEADS, num_slots, HEAD).to(dtype) for _ in range(2))

        def ours(keys: torch.Tensor = keys, values: torch.Tensor = values) -> None:
            for k, v in zip(keys, values, strict=True):
                decode_attention(q, k, v, lengths, starts, scale=0.125)

        def theirs(keys: torch.Tensor = keys, values: torch.Tensor = values) -> None:
            for k, v in zip(keys, values, strict=True):
                torch.nn.functional.scaled_dot_product_attention(q[:, :, None].to(k.dtype), k, v, enable_gqa=True)

        name = str(dtype).removeprefix("torch.")
        for label, action in ((f"attention {name}", ours), (f"torch attention {name}", theirs)):
            found.append(Case(label, action, keys.nbytes + values.nbytes))
    return found


def prompt_cases(num_tokens: int = 512) -> list[Case]:
    """What a prompt is read with, beside torch's own in bfloat16: a product, the FFN with all experts, attention."""
    x, weight = torch.randn(num_tokens, D), torch.randn(F, D) / D**0.5
    gate, up, down = pack(weight, "bf16"), pack(weight, "bf16"), pack(torch.randn(D, F) / F**0.5, "bf16")
    sizes = [F // 4 * (i + 1) for i in range(4)]
    half, plain = x.bfloat16(), weight.bfloat16()
    q, k, v = (torch.randn(heads, num_tokens, HEAD) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q16, k16, v16 = (one[None].bfloat16() for one in (q, k, v))
    product, seen = 2 * num_tokens * F * D, 2 * HEADS * HEAD * num_tokens * (num_tokens + 1)
    found = [
        Case("prompt product", lambda: many_rows(x, gate), gate.nbytes, product),
        Case("torch prompt product", lambda: torch.nn.functional.linear(half, plain), plain.nbytes, product),
        Case("prompt attention", lambda: causal_attention(q, k, v, scale=0.125), k16.nbytes + v16.nbytes, seen),
        Case(
            "torch prompt attention",
            lambda: torch.nn.functional.scaled_dot_product_attention(q16, k16, v16, is_causal=True, enable_gqa=True),
            k16.nbytes + v16.nbytes,
            seen,
        ),
    ]
    for label, low in (("full", 3), ("mixed", 0)):
        experts = torch.arange(num_tokens) % (4 - low) + low
        flops = 6 * D * sum(sizes[expert] for expert in experts.tolist())
        action = lambda experts=experts: grouped_ffn(x, gate, up, [down], [None], sizes, experts)  # noqa: E731
        found.append(Case(f"prompt ffn {label}", action, 3 * gate.nbytes, flops))
    return found


def measure(cases: list[Case], repeats: int) -> list[dict[str, float | str]]:
    """Rounds over all cases, so that a slow moment of the machine meets all of them; medians and best of seconds."""
    block = aligned_bytes(BLOCK)
    block.fill_(1)
    code = library()
    if code is None:
        raise SystemExit("no native kernels on this machine: nothing to measure")
    place, size = ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(BLOCK)
    cases = [Case("read", lambda: code.rheostat_read(place, size, torch.get_num_threads()), BLOCK), *cases]
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            start = time.perf_counter()
            case.run()
            seconds[case.name].append(time.perf_counter() - start)
    roof = [BLOCK / statistics.median(seconds["read"]), BLOCK / min(seconds["read"])]
    rows = []
    for case in cases:
        median, best = statistics.median(seconds[case.name]), min(seconds[case.name])
        rates = case.num_bytes / median, case.num_bytes / best
        rows.append(
            {
                "case": case.name,
                "gb_per_s": rates[0] / 1e9,
                "of_read": rates[0] / roof[0],
                "best_gb_per_s": rates[1] / 1e9,
                "best_of_read": rates[1] / roof[1],
                "gflop_per_s": case.flops / median / 1e9,
                "best_ms": best * 1e3,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--parts", nargs="+", default=["products", "ffn", "attention", "prompts"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    parts = {
        "products": lambda: product_cases(tuple(arguments.rows)),
        "ffn": ffn_cases,
        "attention": attention_cases,
        "prompts": prompt_cases,
    }
    rows = measure([case for part in arguments.parts for case in parts[part]()], arguments.repeats)
    print(f"{'case':24s} {'GB/s':>7s} {'of read':>8s} {'best':>7s} {'of read':>8s} {'GFLOP/s':>8s}")
    for row in rows:
        print(
            f"{row['case']:24s} {row['gb_per_s']:7.1f} {row['of_read']:8.2f} {row['best_gb_per_s']:7.1f} "
            f"{row['best_of_read']:8.2f} {row['gflop_per_s']:8.1f}"
        )
    if arguments.json:
        print(json.dumps({"rows": rows, "threads": arguments.threads, "hardware": hardware()}))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
