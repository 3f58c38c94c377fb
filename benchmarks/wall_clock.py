"""Does the dial show on the clock? Prefill and decode: stock transformers, dial 1.0 and lower dials,
interleaved in one run.

    python benchmarks/wall_clock.py demo --compute 1.0,0.7 --prompt 1024 --new 64 --rounds 7

ARTIFACT is what `rheostat adapt` wrote; the stock side is the same folder loaded by plain transformers. Each round
times all sides once, in turn, so that drift of the machine hits all alike; medians and quartiles are printed, and
ratios are of medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

import rheostat
from rheostat.provenance import provenance


def matrix_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """GFLOP/s of a square product: what prefill could reach."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e9


def stream_rate(dtype: torch.dtype) -> float:
    """GB/s of one-row products over weights too large for the caches: what decode could reach with these kernels."""
    row = torch.randn(1, 576).to(dtype)
    weights = [torch.randn(1536, 576).to(dtype) for _ in range(90)]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(row, weight)
        times.append(time.perf_counter() - start)
    return sum(w.numel() * w.element_size() for w in weights) / statistics.median(times) / 1e9


@torch.inference_mode()
def once(model: torch.nn.Module, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds of the prefill, and of one decode step."""
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(new):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return prefill, (time.perf_counter() - start) / new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--compute", default="1.0,0.7")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    adapted, tokenizer = rheostat.load(args.artifact, dtype=args.dtype)
    dtype = getattr(torch, args.dtype)
    stock = AutoModelForCausalLM.from_pretrained(args.artifact, dtype=dtype).eval()
    from rheostat.text import pack, read_texts

    ids = pack(tokenizer, read_texts("builtin:heldout"), length=args.prompt, limit=1)
    sides = {"stock": None} | {f"dial {c}": float(c) for c in args.compute.split(",")}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    spent = {}
    for turn in range(args.rounds + 1):
        for side, compute in sides.items():
            if compute is None:
                seconds = once(stock, ids, args.new)
            else:
                # Time without the meter's bookkeeping: spend() counts, so count in the warm-up round only.
                with rheostat.spend(compute) as meter:
                    seconds = once(adapted, ids, args.new)
                spent[side] = {"compute": meter.compute, "ffn_fraction": meter.ffn_fraction}
            if turn:  # the first round warms up
                times[side].append(seconds)

    rows = {}
    flops = adapted.geometry.token_flops - 2 * adapted.geometry.head_weights
    for side, pairs in times.items():
        row = {}
        for k, phase in enumerate(("prefill", "decode")):
            values = sorted(pair[k] * 1e3 for pair in pairs)
            quartiles = statistics.quantiles(values, n=4)
            row[phase] = {"median_ms": statistics.median(values), "low_ms": quartiles[0], "high_ms": quartiles[2]}
        rows[side] = row | spent.get(side, {})
    base = rows["stock"]
    print(f"{'side':<12}{'prefill ms':>22}{'vs stock':>10}{'decode ms/token':>22}{'vs stock':>10}{'FFN':>8}")
    for side, row in rows.items():
        cells = []
        for phase in ("prefill", "decode"):
            r = row[phase]
            cells.append(f"{r['median_ms']:>9.1f} [{r['low_ms']:.1f}, {r['high_ms']:.1f}]".rjust(22))
            cells.append(f"{base[phase]['median_ms'] / r['median_ms']:>9.2f}x")
        print(f"{side:<12}{''.join(cells)}{row.get('ffn_fraction', 1):>8.2f}")
    roof = {"matrix_gflops": matrix_rate(dtype), "stream_gbs": stream_rate(dtype)}
    prefill_rate = flops * args.prompt / (base["prefill"]["median_ms"] / 1e3) / 1e9
    decode_rate = adapted.geometry.token_flops / 2 * dtype.itemsize / (base["decode"]["median_ms"] / 1e3) / 1e9
    print(
        f"stock prefill {prefill_rate:.0f} GFLOP/s of {roof['matrix_gflops']:.0f} measured for a square product; "
        f"stock decode {decode_rate:.1f} GB/s of {roof['stream_gbs']:.1f} measured for one-row products"
    )
    print(json.dumps({"sides": rows, "roof": roof, "settings": vars(args), "provenance": provenance()}))


if __name__ == "__main__":
    main()
