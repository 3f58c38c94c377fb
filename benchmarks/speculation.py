"""Speculation on our own runtime against its own plain decoding: tokens a second, acceptance, and the bound.

    python benchmarks/speculation.py --model ARTIFACT --data DATA --contexts 2048 --new-tokens 90 --weights bf16
    python benchmarks/speculation.py --model ARTIFACT --data DATA --contexts short --new-tokens 90 --sides self,low_dial

DATA has `long/leval_subset.jsonl.gz`, `prompts/spec_bench.jsonl.gz` and `text/wikitext2_raw_test.txt.gz`. Contexts are
numbers of tokens, of which long documents are cut, or `short`: prompts of five kinds. A prompt is read once; all sides
then start from copies of its cache and take turns, round by round. Prefill is left out. Printed are medians of tokens
a second and the ratio to plain decoding of the same round; beside it the most that bytes allow with the acceptance
measured, and the share of that which was reached. Every text is compared with that of plain decoding on the same
kind of cache. `--parts steps` times single passes; `--parts perplexity,memory` say what the cache in planes costs and
saves. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import Cache, DynamicCache

import rheostat
from rheostat.adapted import Adapted
from rheostat.caches.hierarchical import HierarchicalCache
from rheostat.geometry import Geometry
from rheostat.methods.base import positions
from rheostat.provenance import provenance
from rheostat.runtime import packing
from rheostat.runtime.batch import Batch
from rheostat.runtime.engine import Runtime
from rheostat.runtime.planes import PlaneCache
from rheostat.runtime.speculating import NativeHost
from rheostat.runtime.weights import CacheForm, DraftForm
from rheostat.sampling import most_likely
from rheostat.speculate.bound import speedup_bound
from rheostat.speculate.drafter import Drafter
from rheostat.speculate.drafting import LowDial, SelfDrafter
from rheostat.speculate.lookup import PromptLookup
from rheostat.speculate.loop import Ending, speculate
from rheostat.spending import spend

KINDS = ("translation", "summarization", "qa", "math_reasoning", "rag")
SIDES = ("planes", "self", "self_auto", "prompt_lookup", "low_dial", "low_dial_auto")
"""Beside `plain`: plain decoding on the cache in planes, drafts in 4 bits of everything, copying, the low dial."""

QUESTION = "\n\nSummarise the text above in detail.\n"


class Reading:
    """A prompt that was read once; every side starts from a copy of its cache."""

    def __init__(self, runtime: Runtime, adapted: Adapted, ids: torch.Tensor, form: CacheForm) -> None:
        runtime.cache_form = None
        with torch.inference_mode():
            self.batch = Batch.read(runtime, ids, None, adapted.settings("prefill", 1), num_new=512)
        self.form, self.ids, self.adapted = form, ids, adapted

    def fresh(self, *, planes: bool) -> Batch:
        """A batch that nothing has been written after."""
        old = self.batch
        if planes:
            cache: Any = PlaneCache.of(old.cache, self.form.group_size, self.form.value_group_size, 9000)
        else:
            cache = copy.deepcopy(old.cache)
        return Batch(old.runtime, cache, old.positions.clone(), old.logits)


class ReadHost(NativeHost):
    """A host whose prompt has been read."""

    def __init__(self, batch: Batch, adapted: Adapted) -> None:
        super().__init__(batch.runtime, adapted.settings)
        self.batch = batch

    def read(self, input_ids: torch.Tensor, mask: torch.Tensor, num_new: int) -> torch.Tensor:
        """Nothing is left to do."""
        return self.batch.logits


class FourBits(SelfDrafter):
    """The runtime's draft form."""

    def reading(self, state: Any) -> Any:
        """4 bits of everything that has them."""
        return state.host.cheaply()


def write_plain(batch: Batch, number: int) -> tuple[list[int], float]:
    """Greedy text and seconds, the first token's left out."""
    newest = most_likely(batch.logits)
    out, begun = newest.tolist(), time.perf_counter()
    while len(out) < number:
        newest = most_likely(batch.step(newest, None))
        out += newest.tolist()
    return out, time.perf_counter() - begun


def write_drafted(batch: Batch, reading: Reading, drafter: Drafter, length: int | str, number: int) -> dict[str, Any]:
    """The same with a drafter, and what came of its drafts."""
    adapted, ids = reading.adapted, reading.ids
    ending, host = Ending(max_new_tokens=number), ReadHost(batch, adapted)
    with spend(keep_passes=False) as meter:
        rounds = speculate(
            adapted.model, adapted.method, ids, drafter=drafter, draft_length=length, ending=ending, host=host
        )
        out = next(rounds).token_ids[0].tolist()
        begun = time.perf_counter()
        for one in rounds:
            out += one.token_ids[0].tolist()
        seconds = time.perf_counter() - begun
    return {"text": out, "seconds": seconds, "stats": meter.speculation}


def run_sides(reading: Reading, sides: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sides in turn, `args.rounds` times, the first of which warms up and is left out where there are more."""
    low = reading.adapted.dial.low
    drafters: dict[str, Callable[[], Drafter]] = {
        "self": FourBits,
        "self_auto": FourBits,
        "prompt_lookup": PromptLookup,
        "low_dial": lambda: LowDial(low),
        "low_dial_auto": lambda: LowDial(low),
    }
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in ("plain", *sides)}
    for _ in range(args.rounds):
        for side, runs in found.items():
            batch = reading.fresh(planes=side.startswith("self") or side == "planes")
            if side in drafters:
                length = "auto" if side.endswith("auto") else args.draft_length
                runs.append(write_drafted(batch, reading, drafters[side](), length, args.new_tokens))
            else:
                text, seconds = write_plain(batch, args.new_tokens)
                runs.append({"text": text, "seconds": seconds})
    return [figures(side, found, reading, args) for side in found]


def figures(
    side: str, found: dict[str, list[dict[str, Any]]], reading: Reading, args: argparse.Namespace
) -> dict[str, Any]:
    """Of one side, relative to plain decoding in the same round."""
    runs = found[side][1:] or found[side]
    plain = found["plain"][1:] or found["plain"]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(plain, runs, strict=True)]
    like = "planes" if side.startswith("self") or side == "planes" else "plain"
    row: dict[str, Any] = {
        "side": side,
        "tokens_per_second": (args.new_tokens - 1) / median(one["seconds"] for one in runs),
        "speedup": median(ratios),
        "quartiles": quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
        "same_text": like not in found or all(one["text"] == found[like][0]["text"] for one in found[side]),
        "agrees_with_full_cache": sum(
            a == b for a, b in zip(runs[0]["text"], plain[0]["text"], strict=True)
        ) / args.new_tokens,
    }  # fmt: skip
    if "stats" in runs[0]:
        stats = runs[-1]["stats"]
        row |= stats.to_dict() | bound(side, stats, reading, args)
    return row


def bound(side: str, stats: Any, reading: Reading, args: argparse.Namespace) -> dict[str, float]:
    """What bytes allow, with the acceptance measured and the mean number of tokens drafted."""
    if not stats.drafted:
        return {}
    runtime, cache = reading.batch.runtime, reading.batch.cache
    length = sum(stats.drafted) / stats.num_rounds
    weights, drafts = (weight_bytes(form().weights) for form in (runtime.forms.decode, runtime.forms.draft))
    full = cache.used_bytes + args.new_tokens // 2 * cache.used_bytes // int(cache.lengths[0])
    sizes = {4: full, 8: full}
    if side.startswith("self"):
        planes = PlaneCache.of(cache, reading.form.group_size, reading.form.value_group_size)
        sizes = {bits: planes.body.read_bytes(bits) + planes.used_bytes for bits in (4, 8)}
    draft_bytes = {"self": drafts + sizes[4], "prompt": 0}.get(side.split("_")[0], low_bytes(runtime) + full)
    most = speedup_bound(
        acceptance=stats.acceptance,
        draft_length=length,
        plain_bytes=weights + full,
        draft_bytes=draft_bytes,
        check_bytes=weights + sizes[8],
    )
    return {"bound": most, "mean_draft": length}


def weight_bytes(weights: Any) -> int:
    """Bytes of all matrices that a step streams."""
    matrices = [one for one in packing.matrices(weights) if one is not weights.embedding]
    return sum(one.nbytes for one in matrices) + (weights.head.nbytes if weights.head is weights.embedding else 0)


def low_bytes(runtime: Runtime) -> int:
    """Bytes of all matrices where every FFN is its smallest expert."""
    total = weight_bytes(runtime.decode_weights)
    for layer in runtime.decode_weights.layers:
        ffn = layer.ffn
        total -= ffn.gate.nbytes + ffn.up.nbytes + sum(down.nbytes for down in ffn.downs)
        total += 2 * ffn.gate.bytes_of(ffn.sizes[0]) + ffn.downs[0].bytes_of(None, ffn.sizes[0])
    return total


def prompts(args: argparse.Namespace, tokenizer: Any) -> list[tuple[str, torch.Tensor]]:
    """(name, ids [1, T]) of everything to be read."""
    if args.contexts == "short":
        lines = gzip.decompress((args.data / "prompts/spec_bench.jsonl.gz").read_bytes()).decode().splitlines()
        rows = [json.loads(line) for line in lines]
        texts = {kind: [row["turns"][0] for row in rows if row["category"] == kind] for kind in KINDS}
        return [
            (kind, chat(tokenizer, text)[:, -args.longest :]) for kind in KINDS for text in texts[kind][: args.prompts]
        ]
    lines = gzip.decompress((args.data / "long/leval_subset.jsonl.gz").read_bytes()).decode().splitlines()
    documents = [json.loads(line)["input"] for line in lines]
    out = []
    for size in map(int, args.contexts.split(",")):
        kept = [ids for ids in (tokenizer(text)["input_ids"] for text in documents) if len(ids) > size]
        for ids in kept[: args.prompts]:
            cut = tokenizer.decode(ids[: size - 64])
            out.append((str(size), chat(tokenizer, cut + QUESTION)))
    return out


def chat(tokenizer: Any, text: str) -> torch.Tensor:
    """One turn of a user, [1, T]."""
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def show(name: str, row: dict[str, Any]) -> None:
    """One line."""
    drafts = ""
    if "acceptance" in row:
        places = " ".join(f"{share:.2f}" for share in row["acceptance_by_place"])
        reached = f", {row['speedup'] / row['bound']:.2f} of the bound {row['bound']:.2f}" if "bound" in row else ""
        drafts = f"  accepted {row['acceptance']:.2f} ({places})  {row['tokens_per_round']:.2f} a round{reached}"
    same = "" if row["same_text"] else "  TEXT DIFFERS"
    low, high = row["quartiles"]
    print(
        f"{name:14} {row['side']:14} {row['tokens_per_second']:6.1f} tokens/s  {row['speedup']:.2f}x "
        f"({low:.2f}-{high:.2f}){drafts}{same}",
        flush=True,
    )
    if row.get("verdict"):
        print(f"{'':29} {row['verdict']}", flush=True)


def speed(adapted: Adapted, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All prompts, all sides."""
    form, places = CacheForm(group_size=args.group_size), tuple(args.draft_weights.split(","))
    runtime = Runtime(
        adapted.model, args.weights, adapted.hook_ids, cache_form=form, draft_form=DraftForm(places=places)
    )
    runtime.prepare(draft=True)
    sides = [side for side in args.sides.split(",") if adapted.dial.low < 1 or not side.startswith("low")]
    rows = []
    for name, ids in prompts(args, tokenizer):
        reading = Reading(runtime, adapted, ids, form)
        for row in run_sides(reading, sides, args):
            rows.append(row | {"prompt": name, "tokens": ids.shape[1]})
            show(name, row)
    return rows


def steps(adapted: Adapted, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a plain step, of checks of some tokens and of a drafted token, on a full cache and on planes."""
    form, places = CacheForm(group_size=args.group_size), tuple(args.draft_weights.split(","))
    runtime = Runtime(
        adapted.model, args.weights, adapted.hook_ids, cache_form=form, draft_form=DraftForm(places=places)
    )
    rows = []
    for size in [256, 4096] if args.contexts == "short" else map(int, args.contexts.split(",")):
        cache = Runtime.new_cache(runtime, 1, size)
        for states in (cache.keys, cache.values):
            states[:, :, :, :size] = torch.randn(states[:, :, :, :size].shape)
        cache.lengths.fill_(size)
        held = {"full": cache, "planes": PlaneCache.of(cache, args.group_size)}
        runs: dict[tuple[str, str], Callable[[], None]] = {}
        for name, one in held.items():
            batch = Batch(runtime, one, torch.tensor([size]), torch.empty(0))
            for number in (1, 2, 3, 5, 7):
                runs[name, f"check of {number}"] = lambda batch=batch, number=number: one_check(
                    batch, number, draft=False
                )
            runs[name, "draft"] = lambda batch=batch: one_check(batch, 1, draft=True)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for _ in range(12):
            for key, run in runs.items():
                begun = time.perf_counter()
                run()
                times[key].append(time.perf_counter() - begun)
        for name in held:
            row = {what: 1e3 * median(found[1:]) for (one, what), found in times.items() if one == name}
            rows.append({"tokens": size, "cache": name} | row)
            print(size, name, "  ".join(f"{what} {ms:.1f} ms" for what, ms in row.items()), flush=True)
    return rows


def one_check(batch: Batch, number: int, *, draft: bool) -> None:
    """Read some tokens and forget them."""
    if batch.cache.body is not None:
        batch.cache.body.bits = 4 if draft else 8
    batch.check(torch.arange(5, 5 + number), None, [number], is_draft=draft)
    batch.take_back([number])


def perplexity(adapted: Adapted, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Of the tokens after a prompt of half a window, read in chunks behind a full, an 8-bit and a 4-bit cache."""
    text = gzip.decompress((args.data / "text/wikitext2_raw_test.txt.gz").read_bytes()).decode()
    ids = tokenizer(text[: args.windows * args.window * 8], return_tensors="pt")["input_ids"][0]
    windows = ids[: args.windows * args.window].view(args.windows, args.window)
    config = adapted.config
    caches = {
        "full": lambda: DynamicCache(config=config),
        "8 bits": lambda: HierarchicalCache(config, is_remembering=True),
        "4 bits": lambda: HierarchicalCache(config, num_planes=1, is_remembering=True),
    }
    return {name: math.exp(mean_loss(adapted, windows, make())) for name, make in caches.items()}


@torch.inference_mode()
def mean_loss(adapted: Adapted, windows: torch.Tensor, cache: Cache, chunk: int = 64) -> float:
    """Nats a token of the second halves of `windows` [N, T]."""
    half, losses, newest = windows.shape[1] // 2, [], torch.empty(0)
    for start in [0, *range(half, windows.shape[1], chunk)]:
        stop = start + chunk if start else half
        mask, block = torch.ones(len(windows), stop, dtype=torch.long), windows[:, start:stop]
        position_ids = positions(mask)[:, start:]
        logits = adapted.model(block, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
        if start:
            guesses = torch.cat([newest, logits[:, :-1]], 1)
            losses.append(torch.nn.functional.cross_entropy(guesses.flatten(0, 1), block.flatten()))
        newest = logits[:, -1:].clone()
    return float(torch.stack(losses).mean())


def memory(adapted: Adapted, num_tokens: int) -> dict[str, Any]:
    """Bytes of a cache of `num_tokens` tokens in bfloat16, and their share of the 16-bit cache."""
    geometry = Geometry.from_config(adapted.config)
    states = torch.randn(1, geometry.num_kv_heads, num_tokens, geometry.head_dim, dtype=torch.bfloat16)
    out: dict[str, Any] = {"tokens": num_tokens, "full": 2 * states.nbytes * geometry.num_layers}
    for name, planes in (("8 bits", 2), ("4 bits", 1)):
        cache = HierarchicalCache(adapted.config, num_planes=planes)
        for layer in range(geometry.num_layers):
            cache.update(states, states, layer)
        out[name], out[f"{name} share"] = cache.num_bytes, cache.num_bytes / out["full"]
    return out


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", default="speed")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--contexts", default="short", help="numbers of tokens, or short")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--prompts", type=int, default=1, help="of each kind or context")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a short prompt")
    parser.add_argument("--new-tokens", type=int, default=90)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--draft-weights", default="ffn,attention,head")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    found, tokenizer = rheostat.load(args.model, dtype="float32")
    adapted = found if isinstance(found, Adapted) else Adapted(found)
    parts, out = args.parts.split(","), {"settings": {k: str(v) for k, v in vars(args).items()}}
    made: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(adapted, tokenizer, args),
        "steps": lambda: steps(adapted, tokenizer, args),
        "perplexity": lambda: perplexity(adapted, tokenizer, args),
        "memory": lambda: memory(adapted, 8192),
    }
    figures_of = {part: made[part]() for part in parts}
    for part in parts:
        if part not in ("speed", "steps"):
            print(part, figures_of[part], flush=True)
    print(json.dumps(out | figures_of | {"provenance": provenance(seed=0)}))


if __name__ == "__main__":
    main()
