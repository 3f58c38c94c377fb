"""Our own runtime beside stock `transformers` and llama.cpp: one table, every row with medians and quartiles.

    python benchmarks/speed_table.py demo --parts decode,prefill,batch,long,cold,quality --rounds 5

MODEL is an adapted model. All sides of a part are warm and take turns. The last line is one JSON object.
docs/runtime.md explains the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import rheostat
from rheostat.adapted import Adapted
from rheostat.bench import llama
from rheostat.bench.native import NativeSide
from rheostat.bench.roof import Roof, measure_roof
from rheostat.bench.sides import Side, SideSpec, once, stock_model
from rheostat.bench.sides import TorchSide as StockSide
from rheostat.bench.timing import ratios, summarise, take_turns
from rheostat.report import origin
from rheostat.runtime.engine import Runtime
from rheostat.text import pack, read_texts

PARTS = ("decode", "prefill", "batch", "long", "cold", "quality")

FORMATS = ("fp32", "bf16", "fp16", "int8", "mixed", "int4")

Row = dict[str, Any]


class Bench:
    """What all parts share."""

    def __init__(self, source: str, low: Sequence[float], rounds: int, dtypes: Sequence[str]) -> None:
        self.source, self.rounds, self.dtypes = source, rounds, dtypes
        self.adapted: Adapted
        self.adapted, self.tokenizer = rheostat.load(source)  # type: ignore[assignment]
        self.low = [compute for compute in low if compute >= self.adapted.dial.low]
        self.roof: Roof = measure_roof("cpu")
        self.runtimes: dict[str, Runtime] = {}

    def ids(self, rows: int, length: int) -> torch.Tensor:
        """Prompts [B, T] of held-out text."""
        texts = read_texts("builtin:heldout")
        return pack(self.tokenizer, texts, length=length, limit=rows, seed=0, name="data")[:rows]

    def native(self, format: str, compute: float = 1.0, context: int = 32) -> NativeSide:
        """Our runtime; sides of one format share its weights."""
        spec = SideSpec(kind="native", model=self.source, weights=format, compute=compute, context=context)
        side = NativeSide(spec, self.adapted, self.runtimes.get(format))
        self.runtimes[format] = side.runtime
        return side

    def stock(self, dtype: str) -> Side:
        """Plain `transformers`."""
        return StockSide(SideSpec(kind="stock", model=self.source, dtype=dtype), stock_model(self.source, dtype, "cpu"))

    def llama(self, context: int) -> list[Side]:
        """llama.cpp on the GGUF file that the model was made from, where both are there."""
        file = llama.find_gguf(self.source, self.adapted.report.get("provenance", {}).get("base_digest"))
        if not llama.is_installed() or file is None:
            return []
        return [llama.LlamaSide(SideSpec(kind="llama.cpp", model=str(file), context=context))]

    def times(self, sides: Sequence[Side], ids: torch.Tensor, new: int) -> list[Row]:
        """A row a side: times and rates of both phases."""
        trials = {side.spec.label: partial(once, side, ids, new) for side in sides}
        found = take_turns(trials, rounds=self.rounds)
        return [self._row(side, ids, new, found[side.spec.label]) for side in sides]

    def _row(self, side: Side, ids: torch.Tensor, new: int, seconds: dict[str, list[float]]) -> Row:
        spent = side.spent(ids, new - 1)
        row: Row = {"side": side.spec.label, "rows": len(ids), "prompt": ids.shape[1], "spent": spent.compute}
        for phase, cost, passes in (("first_token", spent.prefill, 1), ("token", spent.decode, spent.num_steps)):
            summary = summarise(seconds[phase])
            num_bytes, flops = cost.bytes.total / passes, cost.flops.total / passes
            row[phase] = summary.to_dict() | {
                "all": seconds[phase],
                "bytes": num_bytes,
                "flops": flops,
                "of_bandwidth": num_bytes / summary.median / self.roof.bandwidth,
            }
        return row


def compare(rows: Sequence[Row], phase: str, ours: str, other: str) -> Row:
    """How many times as fast ours is, round by round; and the ratio of bytes and of FLOPs of the two."""
    a, b = (next(row for row in rows if row["side"] == name)[phase] for name in (ours, other))
    work = {key: b[key] / a[key] for key in ("bytes", "flops")}
    return {"ours": ours, "other": other, "phase": phase, "times": ratios(b["all"], a["all"]).to_dict(), "less": work}


def decode(bench: Bench) -> Row:
    """One row after a prompt of 128 tokens: formats at dial 1, and two of them at lower dials."""
    stock = [bench.stock("float16")]
    dials = [bench.native(format, compute) for format in ("bf16", "int8", "mixed") for compute in bench.low]
    ours = [bench.native(format) for format in FORMATS]
    others = bench.llama(256)
    rows = bench.times([*stock, *ours, *dials, *others], bench.ids(1, 128), 33)
    pairs = [(side.spec.label, stock[0].spec.label) for side in ours]
    pairs += [(side.spec.label, other.spec.label) for side in ours for other in others]
    pairs += [(side.spec.label, f"native {side.spec.weights} 1") for side in dials]
    return {"rows": rows, "compared": [compare(rows, "token", *pair) for pair in pairs]}


def prefill(bench: Bench) -> Row:
    """Prompts of 512 and 2048 tokens."""
    out: Row = {"rows": [], "compared": []}
    sides: list[Side] = [bench.stock("bfloat16"), bench.native("bf16")]
    sides += [bench.native("bf16", compute) for compute in bench.low] + bench.llama(2100)
    for length in (512, 2048):
        rows = bench.times(sides, bench.ids(1, length), 2)
        labels = [side.spec.label for side in sides]
        pairs = [(labels[1], name) for name in labels if name.startswith(("stock", "llama"))]
        pairs += [(name, labels[1]) for name in labels[2:] if name.startswith("native")]
        out["rows"] += rows
        out["compared"] += [compare(rows, "first_token", *pair) | {"prompt": length} for pair in pairs]
    return out


def batch(bench: Bench) -> Row:
    """8 and 16 rows of 128 tokens with mixed dials, against stock in each dtype that is asked for."""
    out: Row = {"rows": [], "compared": []}
    stock = [bench.stock(dtype) for dtype in bench.dtypes]
    for number in (8, 16):
        ours = [bench.native(format) for format in ("bf16", "int8", "mixed")]
        for side in ours:
            choices = [1.0, *bench.low]
            side.compute = [choices[row % len(choices)] for row in range(number)]
            side.spec = replace(side.spec, compute=sum(side.compute) / number)
        rows = bench.times([*stock, *ours], bench.ids(number, 128), 17)
        best = min((row for row in rows if row["side"].startswith("stock")), key=lambda row: row["token"]["median"])
        out["rows"] += rows
        out["compared"] += [compare(rows, "token", side.spec.label, best["side"]) | {"batch": number} for side in ours]
    return out


def long(bench: Bench) -> Row:
    """Decoding with 4096 tokens in the cache: the prompt is read once, and the cache cut back after each round."""
    ids, new, rows = bench.ids(1, 4096), 16, []
    sides = [bench.native(format, context=64) for format in ("bf16", "int8", "mixed")]
    states = {}
    for side in sides:
        with side.session():
            states[side.spec.label] = side.prefill(ids)
    trials = {side.spec.label: partial(_again, side, states[side.spec.label], new) for side in sides}
    found = take_turns(trials, rounds=bench.rounds)
    for side in sides:
        summary = summarise(found[side.spec.label]["token"])
        geometry, held = bench.adapted.geometry, side.runtime.cache_dtype.itemsize
        cached = geometry.num_layers * geometry.kv_values * held * (4096 + new // 2)
        weights = side.spent(ids[:, :8], 1).decode.bytes
        num_bytes = weights.total - weights.scores + cached
        rate = num_bytes / summary.median / bench.roof.bandwidth
        rows.append({"side": side.spec.label, "token": summary.to_dict(), "bytes": num_bytes, "of_bandwidth": rate})
    return {"rows": rows, "compared": []}


def _again(side: NativeSide, state: tuple[Any, torch.Tensor], new: int) -> dict[str, float]:
    batch, _ = state
    with side.session():
        start = time.perf_counter()
        for _ in range(new):
            state = side.decode(state)
        side.wait()
        seconds = (time.perf_counter() - start) / new
        batch.cache.truncate(4096)
        batch.positions.fill_(4096)
    return {"token": seconds}


def cold(bench: Bench) -> Row:
    """From the start of a process to the end of one that writes one token, kernels built before; what importing torch
    alone takes; and the same through `transformers`."""
    generate = ["-m", "rheostat", "generate", bench.source, "Hello", "--max-new-tokens", "1"]
    commands = {"import torch": ["-c", "import torch"], "native": generate}
    commands |= {f"native {format}": [*generate, "--weights", format] for format in ("bf16", "mixed")}
    commands["stock"] = [*generate, "--runtime", "stock"]

    def run(command: list[str]) -> dict[str, float]:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        return {"process": time.perf_counter() - start}

    found = take_turns({side: partial(run, command) for side, command in commands.items()}, rounds=bench.rounds)
    return {
        "rows": [{"side": side, "process": summarise(one["process"]).to_dict()} for side, one in found.items()],
        "compared": [],
    }


@torch.inference_mode()
def quality(bench: Bench) -> Row:
    """Perplexity of each format on held-out text, every token through the decode step: 16 rows of 192 tokens."""
    ids = bench.ids(16, 192)
    rows = []
    for format in FORMATS:
        runtime = bench.native(format).runtime
        cache, loss = runtime.new_cache(len(ids), ids.shape[1]), 0.0
        for place in range(ids.shape[1] - 1):
            positions = torch.full((len(ids),), place)
            logits, _ = runtime.step(ids[:, place].contiguous(), positions, cache, None)
            loss += float(torch.nn.functional.cross_entropy(logits, ids[:, place + 1], reduction="sum"))
        perplexity = torch.tensor(loss / (len(ids) * (ids.shape[1] - 1))).exp()
        rows.append({"side": format, "perplexity": float(perplexity)})
    base = rows[0]["perplexity"]
    return {"rows": [row | {"against_fp32": row["perplexity"] / base} for row in rows], "compared": []}


def show(part: str, found: Row) -> None:
    """Figures for people."""
    print(f"\n{part}")
    for row in found["rows"]:
        cells = [f"{row['side']:<24}"] + [f"{key} {row[key]}" for key in ("rows", "prompt") if key in row]
        for phase in ("first_token", "token", "process"):
            if phase in row:
                one = row[phase]
                cells.append(f"{phase} {1e3 * one['median']:.2f} ms ({1e3 * one['low']:.2f}-{1e3 * one['high']:.2f})")
                cells += [f"{one['of_bandwidth']:.2f} of roof"] if phase == "token" and "of_bandwidth" in one else []
        cells += [f"{key} {row[key]:.4f}" for key in ("perplexity", "against_fp32", "of_bandwidth") if key in row]
        print("  " + "  ".join(cells))
    for one in found["compared"]:
        times, less = one["times"], one["less"]
        print(
            f"  {one['ours']} is {times['median']:.2f}x ({times['low']:.2f}-{times['high']:.2f}) {one['other']} in "
            f"{one['phase']}; bytes {less['bytes']:.2f}x, flops {less['flops']:.2f}x"
        )


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--low", default="0.7,0.6", help="lower settings of the dial")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stock", default="float32,bfloat16,float16", help="dtypes of stock in batches")
    args = parser.parse_args()
    known: dict[str, Callable[[Bench], Row]] = {
        one.__name__: one for one in (decode, prefill, batch, long, cold, quality)
    }
    load_before = os.getloadavg()[0]
    bench = Bench(args.artifact, [float(one) for one in args.low.split(",")], args.rounds, args.stock.split(","))
    figures: Row = {"load": load_before, "roof": bench.roof.to_dict(), "parts": {}}
    for part in args.parts.split(","):
        figures["parts"][part] = known[part](bench)
        show(part, figures["parts"][part])
    figures["provenance"] = origin(seed=0, model=args.artifact)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
