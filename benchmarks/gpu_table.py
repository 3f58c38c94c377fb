"""The speed table on a GPU: the Triton kernels against stock transformers with its static cache and compile.

    python benchmarks/gpu_table.py --out gpu.json            # on a machine with CUDA; planned for less than ten minutes
    TRITON_INTERPRET=1 python benchmarks/gpu_table.py --device cpu --tiny   # the same code path in the interpreter

A model of Llama-3.2-1B's sizes with random weights serves both sides. Parts, each written to `--out` when it is done:
`roof` (read rate, bfloat16 products), `checks` (each kernel against its plain twin, the whole step against
transformers), `tuning` (ways to cut, the fastest kept), `decode` (batch 1, 8, 16; dial 1.0 and 0.6; 16, 8 and 4 bits),
`prefill` (512 and 2048 tokens), `kernels`. Sides alternate in rounds; figures are medians with quartiles, in
milliseconds, with the fraction of the roof. A part that `--minutes` leaves no room for is named under `left_out`. Exit
status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_decoder import Decoder, Tuned, Weights, capture

from rheostat.errors import SettingError, bad_setting
from rheostat.kernels import plain
from rheostat.kernels.triton import (
    DeviceMatrix,
    NestedWeights,
    NibbleBody,
    bytes_read,
    decode_attention,
    few_rows,
    language,
    pack,
    planes_attention,
)
from rheostat.kernels.triton import plain as twins
from rheostat.kernels.triton.ffn_few import FUSED
from rheostat.kernels.triton.ffn_many import GROUPED
from rheostat.kernels.triton.products import CANDIDATES

LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
TINY = LLAMA_1B | {
    "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip
BATCHES, PROMPTS, CACHED, DIALS, FORMATS = (1, 8, 16), (512, 2048), 512, (1.0, 0.6), ("bf16", "int8", "int4")


class Bench:
    """What all parts share: the device, the clock, the results so far and where they go."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.is_tiny = torch.device(arguments.device), arguments.tiny
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.rounds = 1 if self.is_tiny else arguments.rounds
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.out = Path(arguments.out) if arguments.out else None
        self.batches = BATCHES[:2] if self.is_tiny else BATCHES
        self.tuned = Tuned({})
        self.results: dict[str, Any] = {"left_out": [], "machine": machine(self.device), "started": time.time()}

    def keep(self, part: str, found: Any) -> None:
        """Add a part's results and write all there are."""
        self.results[part] = found
        self.results["seconds"] = time.time() - self.results["started"]
        print(f"== {part} ({self.results['seconds']:.0f} s)", flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.results, indent=1))

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether that much is left; if not, `what` is noted."""
        if time.monotonic() + seconds <= self.deadline:
            return True
        self.results["left_out"].append(what)
        return False

    def milliseconds(self, action: Callable[[], object], repeats: int) -> float:
        """One run of `action`, mean of `repeats` in a row."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                action()
            return (time.perf_counter() - start) * 1e3 / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            action()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / repeats

    def interleaved(self, sides: dict[str, Callable[[], object]], repeats: int = 10) -> dict[str, dict[str, float]]:
        """Median and quartiles of each side's milliseconds; the sides alternate, after a warm-up of each."""
        repeats = 1 if self.is_tiny else repeats
        for action in sides.values():
            self.milliseconds(action, 1 if self.is_tiny else 2)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(self.rounds):
            for name, action in sides.items():
                times[name].append(self.milliseconds(action, repeats))
        found = {}
        for name, values in times.items():
            low, median, high = (
                statistics.quantiles(values, n=4) if len(values) > 2 else (min(values), values[0], max(values))
            )
            found[name] = {"ms": median, "low": low, "high": high, "best": min(values)}
        return found

    def graph(self, action: Callable[[], object]) -> Callable[[], object]:
        """`action` as a CUDA graph, where there is CUDA."""
        return capture(action) if self.device.type == "cuda" else action

    def copies(self, matrix: DeviceMatrix) -> list[DeviceMatrix]:
        """The matrix in so many places that no cache holds them all."""
        return [matrix.clone() for _ in range(2 if self.is_tiny else max(2, (256 << 20) // max(1, matrix.nbytes)))]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on."""
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(device)}
    if language.triton is not None:
        found |= {"triton": language.triton.__version__, "interpreted": str(language.IS_INTERPRETED)}
    if device.type == "cuda":
        one = torch.cuda.get_device_properties(device)
        found |= {"gpu": one.name, "processors": str(one.multi_processor_count), "bytes": str(one.total_memory)}
    return found


# -- parts


def measure_roof(bench: Bench) -> dict[str, float]:
    """Bytes a second of reading and of copying (read and written), FLOP/s of bfloat16 products; best of all rounds."""
    block = torch.randn((1 << 16) if bench.is_tiny else (1 << 30), device=bench.device)
    other, size = torch.empty_like(block), 64 if bench.is_tiny else 8192
    a, b, out = bench.random(size, size), bench.random(size, size), bench.random(size, size)
    sides = {
        "read": block.sum,
        "largest": block.amax,
        "copy": lambda: other.copy_(block),
        "product": lambda: torch.matmul(a, b.T, out=out),
    }
    times = bench.interleaved(sides, 5)
    read = block.nbytes / min(times["read"]["best"], times["largest"]["best"]) * 1e3
    copy = 2 * block.nbytes / times["copy"]["best"] * 1e3
    flops = 2 * size**3 / times["product"]["best"] * 1e3
    return {"read": read, "copy": copy, "bandwidth": max(read, copy), "flops": flops}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference relative to that of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(bench: Bench) -> dict[str, float]:
    """Relative error of each kernel against its twin, in the dtype that is timed."""
    width, inner = (34, 72) if bench.is_tiny else (2048, 8192)
    found = {}
    weight, back = torch.randn(inner, width) / width**0.5, torch.randn(width, inner) / inner**0.5
    sizes = [inner // 4 * (i + 1) for i in range(3)] + [inner]
    for format in FORMATS:
        gate, down = pack(weight, format, device=bench.device), pack(back, format, device=bench.device)
        for rows in bench.batches:
            x = bench.random(rows, width)
            found[f"few_rows {format} {rows}"] = distance(few_rows(x, gate), plain.few_rows(x.float(), gate))
        own = [pack(back[:, :size], format, device=bench.device) for size in sizes]
        for rows in (*bench.batches, 20 if bench.is_tiny else 600):
            x, experts = bench.random(rows, width), torch.randint(0, 4, (rows,), device=bench.device)
            for name, downs in (("shared", [down]), ("own", own)):
                ffn = gate, gate, downs, [None] * len(downs), sizes
                # Not the plain twin: it makes its result on a CPU. The same sums, expert by expert.
                wanted = torch.cat([expert_ffn(x[i : i + 1].float(), *ffn, int(e)) for i, e in enumerate(experts)])
                found[f"ffn {format} {name} {rows}"] = distance(NestedWeights.of(*ffn).run(x, experts), wanted)
    return found | check_attention(bench)


def expert_ffn(x: torch.Tensor, gate: Any, up: Any, downs: Any, biases: Any, sizes: Any, expert: int) -> torch.Tensor:
    """One row through one expert, in float32; the unpacked matrices are kept."""
    size, down = sizes[expert], downs[expert if len(downs) > 1 else 0]
    g, u, d = (unpacked(w) for w in (gate, up, down))
    hidden = torch.nn.functional.silu(x @ g[:size].T) * (x @ u[:size].T)
    return hidden @ d[:, :size].T


def unpacked(matrix: DeviceMatrix, kept: dict[int, tuple[DeviceMatrix, torch.Tensor]] = {}) -> torch.Tensor:  # noqa: B006
    """`matrix.unpack()`, of the last few kept."""
    if id(matrix) not in kept or kept[id(matrix)][0] is not matrix:
        while len(kept) > 8:
            kept.pop(next(iter(kept)))
        kept[id(matrix)] = matrix, matrix.unpack()
    return kept[id(matrix)][1]


def nibble_cache(bench: Bench, rows: int, heads: int, head_dim: int, groups: int, group: int) -> tuple[Any, ...]:
    """Random bodies of `groups` key groups, whose values have one group a token, and buffers of 2 * group places."""
    tokens, place = groups * group, {"device": bench.device, "dtype": torch.uint8}
    shape = (rows, heads, tokens, head_dim // 2)
    planes = [torch.randint(0, 256, shape, **place) for _ in range(4)]
    spread = [bench.random(rows, heads, *size) for size in ((groups, head_dim), (tokens, 1)) for _ in range(2)]
    keys = NibbleBody(planes[0], planes[1], spread[0].abs() / 8, spread[1], group)
    values = NibbleBody(planes[2], planes[3], spread[2].abs() / 8, spread[3], head_dim)
    return keys, values, *(bench.random(rows, heads, 2 * group, head_dim) for _ in range(2))


def check_attention(bench: Bench) -> dict[str, float]:
    """Likewise of attention, over a plain cache and over nibble planes."""
    slots, group, head_dim = (60, 16, 12) if bench.is_tiny else (3000, 128, 64)
    found = {}
    for rows in bench.batches[:2]:
        q, keys, values = (
            bench.random(rows, *size) for size in ((8, head_dim), (2, slots, head_dim), (2, slots, head_dim))
        )
        lengths = torch.randint(1, slots, (rows,), device=bench.device)
        starts = lengths // 3
        given = {"scale": head_dim**-0.5, "window": slots // 2, "softcap": 5.0}
        wanted = plain.decode_attention(
            *(one.float().cpu() for one in (q, keys, values)), lengths.cpu(), starts.cpu(), **given
        )
        found[f"attention {rows}"] = distance(decode_attention(q, keys, values, lengths, starts, **given).cpu(), wanted)
        cache = nibble_cache(bench, rows, 2, head_dim, 3, group)
        body = torch.randint(0, 4, (rows,), device=bench.device) * group
        queries = bench.random(rows, 3, 8, head_dim)
        for bits in (4, 8):
            all_given = (queries, *cache, body, body + group + 5)
            wanted = twins.planes_attention(*all_given, scale=head_dim**-0.5, bits=bits)
            found[f"planes {bits} {rows}"] = distance(
                planes_attention(*all_given, scale=head_dim**-0.5, bits=bits), wanted
            )
    return found


def tune(bench: Bench, config: Any) -> dict[str, Any]:
    """Keep the fastest way to cut each product, the FFN and attention; one that does not compile is passed over."""
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    shapes = ((heads, width), (width, width), (config.vocab_size, width))
    found: dict[str, Any] = {}
    for outputs, inputs in shapes:
        many = bench.copies(DeviceMatrix.view(bench.random(outputs, inputs)))
        for rows in (1, 16):
            x, tried = bench.random(rows, inputs), {}
            for tiles in CANDIDATES[rows][: 1 if bench.is_tiny else None]:
                tried[tiles] = attempt(bench, lambda x=x, many=many, t=tiles: [few_rows(x, w, tiles=t) for w in many])
            best = bench.tuned.products[outputs, inputs, rows] = min(tried, key=lambda one: tried[one])
            found[f"product {outputs}x{inputs} rows={rows}"] = {str(t): ms for t, ms in tried.items()} | {
                "best": str(best)
            }
    weights = [DeviceMatrix.view(bench.random(*size)) for size in ((inner, width), (inner, width), (width, inner))]
    ffns = [
        NestedWeights.of(*(w.clone() for w in weights[:2]), [weights[2].clone()], [None], [inner]) for _ in range(4)
    ]
    for name, rows, ways in (
        ("fused_one", 1, FUSED),
        ("fused", 16, FUSED),
        ("grouped", 20 if bench.is_tiny else 2048, GROUPED),
    ):
        x, experts = bench.random(rows, width), torch.zeros(rows, dtype=torch.int64, device=bench.device)
        # The grouped product sorts, and may take few rows too: it stands for them if it is the faster.
        tried = {}
        for tiles in ways[: 1 if bench.is_tiny else None]:
            tried[tiles] = attempt(bench, lambda x=x, e=experts, t=tiles: [ffn.run(x, e, tiles=t) for ffn in ffns])
        setattr(bench.tuned, name, min(tried, key=lambda one: tried[one]))
        found[name] = {str(t): ms for t, ms in tried.items()} | {"best": str(getattr(bench.tuned, name))}
    return found


def attempt(bench: Bench, action: Callable[[], object]) -> float:
    """Milliseconds of `action` as a graph, best of three; infinite if it cannot be built (too little shared memory)."""
    try:
        run = bench.graph(action)
        run()
        return min(bench.milliseconds(run, 1 if bench.is_tiny else 5) for _ in range(1 if bench.is_tiny else 3))
    except Exception as error:  # whatever Triton raises: another way to cut remains
        print(f"   passed over: {type(error).__name__}: {str(error)[:100]}", flush=True)
        torch.cuda.synchronize() if bench.device.type == "cuda" else None
        return float("inf")


def time_kernels(bench: Bench, config: Any, roof: dict[str, float]) -> list[dict[str, Any]]:
    """Each kernel alone over many copies of its weights, and torch's linear beside it."""
    width, inner, sides, sizes = config.hidden_size, config.intermediate_size, {}, {}
    weight = torch.randn(inner, width) / width**0.5
    for format in FORMATS:
        many = bench.copies(pack(weight, format, device=bench.device))
        for rows in bench.batches:
            x, name = bench.random(rows, width), f"few_rows {format} rows={rows}"
            sides[name] = bench.graph(lambda x=x, many=many: [few_rows(x, w) for w in many])
            sizes[name] = sum(w.nbytes for w in many)
    plain_many = [bench.random(inner, width) for _ in range(2 if bench.is_tiny else 8)]
    for rows in bench.batches:
        x, name = bench.random(rows, width), f"torch linear rows={rows}"
        sides[name] = bench.graph(lambda x=x: [torch.nn.functional.linear(x, w) for w in plain_many])
        sizes[name] = sum(w.nbytes for w in plain_many)
    heads, head_dim = config.num_key_value_heads, config.head_dim
    groups, group = (3, 16) if bench.is_tiny else (62, 128)
    cache, tokens = nibble_cache(bench, 1, heads, head_dim, groups, group), (groups + 2) * group
    body, lengths = (torch.full((1,), n, device=bench.device) for n in (groups * group, tokens))
    q = bench.random(1, 1, config.num_attention_heads, head_dim)
    for bits in (4, 8):
        name = f"planes {bits} bits, {tokens} tokens"
        sides[name] = bench.graph(lambda b=bits: planes_attention(q, *cache, body, lengths, scale=0.1, bits=b))
        sizes[name] = sum(bytes_read(*cache[:3], [groups * group], [tokens], bits).values())
    keys, values, zero = bench.random(1, heads, tokens, head_dim), bench.random(1, heads, tokens, head_dim), body * 0
    name = f"attention 16 bits, {tokens} tokens"
    sides[name] = bench.graph(lambda: decode_attention(q[:, 0], keys, values, lengths, zero, scale=0.1))
    sizes[name] = keys.nbytes + values.nbytes
    times = bench.interleaved(sides, 5)
    return [
        {"case": name, **one, "bytes": sizes[name], "of_roof": sizes[name] / one["ms"] * 1e3 / roof["bandwidth"]}
        for name, one in times.items()
    ]


def experts_at(dial: float, config: Any, sizes: tuple[int, ...], tokens: int, device: torch.device) -> torch.Tensor:
    """Experts [L, tokens], random, whose mean cost is `dial` of the dense model's FLOPs a token (attention over the
    cache not counted)."""
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    ffn, rest = 3 * width * sizes[-1], width * heads + width * config.vocab_size / layers
    share = 1 - (1 - dial) * (ffn + rest) / ffn  # of the FFN
    steps = [size / sizes[-1] for size in sizes]
    high = next(i for i, step in enumerate(steps) if step >= share)
    if not high:
        return torch.zeros(layers, tokens, dtype=torch.int64, device=device)
    often = (share - steps[high - 1]) / (steps[high] - steps[high - 1])
    order = torch.rand(layers * tokens, generator=torch.Generator().manual_seed(0)).argsort().view(layers, tokens)
    return torch.where(order < round(often * order.numel()), high, high - 1).to(device)


def stock_step(bench: Bench, model: Any, batch: int, cached: int) -> tuple[Callable[[], object], Any]:
    """A step of transformers with its static cache and compile, and that cache."""
    from transformers import StaticCache

    room = cached + (8 if bench.is_tiny else 40 + 12 * bench.rounds)
    cache = StaticCache(config=model.config, max_cache_len=room)
    prompt = torch.randint(0, model.config.vocab_size, (batch, cached), device=bench.device)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    options = {"backend": "eager"} if bench.device.type == "cpu" else {"mode": "reduce-overhead"}
    step = torch.compile(model, fullgraph=False, dynamic=False, **options)
    token_ids = torch.full((batch, 1), 5, device=bench.device)
    position_ids = torch.full((batch, 1), cached, device=bench.device)
    return lambda: step(input_ids=token_ids, position_ids=position_ids, past_key_values=cache, use_cache=True), cache


def time_decode(bench: Bench, model: Any, packed: dict[str, Weights], roof: dict[str, float]) -> list[dict[str, Any]]:
    """Steps at `CACHED` tokens: ours in each format at each dial, transformers beside them in the same rounds."""
    cached, rows, sizes = 8 if bench.is_tiny else CACHED, [], packed["bf16"].layers[0][2].widths
    for batch in bench.batches:
        if not bench.has_time(f"decode, batch {batch}", 60):
            continue
        sides: dict[str, Callable[[], object]] = {}
        sizes_of: dict[str, int] = {}
        for format in FORMATS:
            for dial in DIALS:
                one = Decoder(packed[format], batch, cached + 1, bench.tuned)
                one.positions.fill_(cached)
                one.experts.copy_(experts_at(dial, model.config, sizes, batch, bench.device))
                name = f"ours {format} dial {dial}"
                sides[name], sizes_of[name] = one.captured(), one.bytes_of_step(cached + 1)
        try:
            sides["transformers"], _ = stock_step(bench, model, batch, cached)
            sides["transformers"]()
            sizes_of["transformers"] = sizes_of["ours bf16 dial 1.0"]
        except Exception as error:  # a version of it that cannot: ours is timed all the same, and it is said
            sides.pop("transformers", None)
            bench.results["left_out"].append(f"transformers, batch {batch}: {type(error).__name__}: {str(error)[:200]}")
        times = bench.interleaved(sides, 1 if "transformers" in sides else 10)
        for name, one in times.items():
            rate = sizes_of[name] / one["ms"] * 1e3
            row = {"batch": batch, "side": name, **one, "bytes": sizes_of[name], "of_roof": rate / roof["bandwidth"]}
            rows.append(row | {"tokens_per_s": batch / one["ms"] * 1e3})
    return rows


def check_step(bench: Bench, model: Any, weights: Weights) -> dict[str, float]:
    """A prompt token by token through our step, and at once through `read`, against transformers' logits."""
    tokens = torch.randint(0, model.config.vocab_size, (1, 9), device=bench.device)
    wanted = model(input_ids=tokens).logits[0].float()
    one = Decoder(weights, 1, 16, bench.tuned)
    replay, seen = one.captured(), []
    for place, token in enumerate(tokens[0]):
        one.token_ids.fill_(token)
        one.positions.fill_(place)
        replay()
        seen.append(one.logits[0].float().clone())
    full = torch.full(
        (len(one.layers), 9), len(weights.layers[0][2].widths) - 1, dtype=torch.int64, device=bench.device
    )
    found = {"step": distance(torch.stack(seen), wanted)}
    found |= {
        f"read, {name}": distance(one.read(tokens[0], e).float(), wanted[-1])
        for name, e in (("dense", None), ("grouped", full))
    }
    return found


def time_prefill(bench: Bench, model: Any, weights: Weights, roof: dict[str, float]) -> list[dict[str, Any]]:
    """Prompts of one row: dense by torch's products, both dials by the grouped FFN, transformers eager and compiled."""
    lengths = (20,) if bench.is_tiny else PROMPTS
    rows = []
    for length in lengths:
        if bench.has_time(f"prefill, {length} tokens", 60):
            rows += time_prompt(bench, model, weights, length, roof)
    return rows


def time_prompt(
    bench: Bench, model: Any, weights: Weights, length: int, roof: dict[str, float]
) -> list[dict[str, Any]]:
    config, sizes = model.config, weights.layers[0][2].widths
    tokens = torch.randint(0, config.vocab_size, (1, length), device=bench.device)
    one = Decoder(weights, 1, length, bench.tuned)
    given = {dial: experts_at(dial, config, sizes, length, bench.device) for dial in DIALS}
    sides: dict[str, Callable[[], object]] = {"ours dense": bench.graph(lambda: one.read(tokens[0], None))}
    for dial, experts in given.items():
        sides[f"ours grouped dial {dial}"] = bench.graph(lambda e=experts: one.read(tokens[0], e))
    sides["transformers"] = lambda: model(input_ids=tokens, logits_to_keep=1)
    options = {"backend": "eager"} if bench.device.type == "cpu" else {"mode": "reduce-overhead"}
    compiled = torch.compile(model, dynamic=False, **options)
    sides["transformers compiled"] = lambda: compiled(input_ids=tokens, logits_to_keep=1)
    rows = []
    for name, found in bench.interleaved(sides, 3).items():
        flops = prefill_flops(config, sizes, length, given[0.6] if name.endswith("0.6") else given[1.0])
        of_roof = flops / found["ms"] * 1e3 / roof["flops"]
        rows.append({"tokens": length, "side": name, **found, "flops": flops, "of_roof": of_roof})
    return rows


def prefill_flops(config: Any, sizes: tuple[int, ...], length: int, experts: torch.Tensor) -> int:
    """FLOPs of a prompt: projections, causal attention, the channels that are used, and one row of the head."""
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    attention = 2 * length * (length + 1) * config.num_attention_heads * config.head_dim
    channels = int(torch.tensor(sizes)[experts.cpu()].sum())
    return layers * (2 * length * width * heads + attention) + 6 * width * channels + 2 * width * config.vocab_size


def random_model(bench: Bench) -> Any:
    """A Llama with random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(TINY if bench.is_tiny else LLAMA_1B), attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for a check of this program, whose times mean nothing"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="parts that would begin later are left out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="a JSON file, written after each part")
    arguments = parser.parse_args()
    try:
        if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
            raise bad_setting("device", arguments.device, "one that this machine has")
        language.check_device(torch.device(arguments.device))
    except SettingError as error:
        parser.error(str(error))
    bench = Bench(arguments)
    torch.manual_seed(0)
    model = random_model(bench)
    inner, head_dim = model.config.intermediate_size, model.config.head_dim
    sizes = tuple(inner // 4 * (i + 1) for i in range(4))
    bench.results["model"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "sizes": sizes,
        "head_dim": head_dim,
    }
    roof = measure_roof(bench)
    bench.keep("roof", roof)
    packed = {format: Weights(model, sizes, format) for format in FORMATS}
    checks = check(bench) | check_step(bench, model, packed["bf16"])
    most = 1e-4 if bench.dtype == torch.float32 else 3e-2
    bench.keep("checks", checks)
    wrong = {name: error for name, error in checks.items() if not error < most}
    if bench.has_time("tuning", 60):
        bench.keep("tuning", tune(bench, model.config))
    bench.keep("decode", time_decode(bench, model, packed, roof))
    bench.keep("prefill", time_prefill(bench, model, packed["bf16"], roof))
    if bench.has_time("kernels", 60):
        bench.keep("kernels", time_kernels(bench, model.config, roof))
    show(bench.results)
    print(json.dumps({"wrong": wrong, "left_out": bench.results["left_out"]}))
    return 1 if wrong else 0


def show(results: dict[str, Any]) -> None:
    """The tables, last of all that is printed but one line."""
    roof, worst = results["roof"], max(results["checks"].values())
    print(f"roof: {roof['bandwidth'] / 1e9:.0f} GB/s, {roof['flops'] / 1e12:.1f} TFLOP/s; worst check {worst:.1e}")
    for part, keys in (("kernels", ("case",)), ("decode", ("batch", "side")), ("prefill", ("tokens", "side"))):
        for row in results.get(part, ()):
            name = " ".join(str(row[key]) for key in keys)
            spread = f"[{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{part:8s} {name:40s} {row['ms']:9.3f} ms {spread}  {row['of_roof']:.2f} of the roof")


if __name__ == "__main__":
    with torch.inference_mode():
        raise SystemExit(main())
