"""Speculative decoding on real text: exactness, acceptance by place, the cache's quality and size, the bound.

    python benchmarks/speculation.py --model ARTIFACT --data DATA --prompts 4 --parts decode,perplexity,memory,bound

DATA has `prompts/spec_bench.jsonl.gz` and `text/wikitext2_raw_test.txt.gz`. The last line of output is one JSON
object. An adapted model brings the low-dial drafter; a dense one does without. Times are those of plain PyTorch,
where drafting in 4 bits saves nothing: they say what the loop costs, not what a kernel would gain.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache

import rheostat
from rheostat.adapted import Adapted
from rheostat.caches.hierarchical import HierarchicalCache
from rheostat.decode import stream
from rheostat.geometry import Geometry
from rheostat.methods import Chain, QuantSpec
from rheostat.methods.base import positions
from rheostat.methods.quantspec.twins import TwinLinear
from rheostat.provenance import provenance
from rheostat.speculate.bound import speedup_bound
from rheostat.spending import spend

KINDS = ("translation", "summarization", "qa", "math_reasoning", "rag")
DRAFTERS = ("self", "low_dial", "prompt_lookup", "streaming_llm", "snapkv")


def read_prompts(data: Path, number: int) -> dict[str, list[str]]:
    """The first `number` prompts of each kind."""
    lines = gzip.decompress((data / "prompts/spec_bench.jsonl.gz").read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return {kind: [row["turns"][0] for row in rows if row["category"] == kind][:number] for kind in KINDS}


def decode(adapted: Adapted, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every drafter on every kind of prompt, in batches, beside plain greedy decoding of the same model and cache."""
    rows = []
    drafters = [name for name in args.drafters.split(",") if name != "low_dial" or adapted.dial.low < 1]
    for kind, prompts in read_prompts(args.data, args.prompts).items():
        for start in range(0, len(prompts), args.batch):
            batch = encode(tokenizer, prompts[start : start + args.batch], args.longest)
            begun = time.perf_counter()
            with spend():
                steps = list(stream(adapted, **batch, max_new_tokens=args.new_tokens))
            plain, plain_seconds = torch.stack([step.token_ids for step in steps], 1), time.perf_counter() - begun
            for name in drafters:
                rows.append(one_draft(adapted, args, name, batch, plain) | {"kind": kind})
                rows[-1]["plain_seconds"] = plain_seconds
                print_row(rows[-1])
    return rows


def encode(tokenizer: Any, prompts: list[str], longest: int) -> dict[str, torch.Tensor]:
    """Chat prompts, padded on the left and cut on the left."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in prompts
    ]
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    out = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=longest)
    return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}


def one_draft(
    adapted: Adapted, args: argparse.Namespace, name: str, batch: dict[str, torch.Tensor], plain: torch.Tensor
) -> dict[str, Any]:
    """Figures of one drafter on one batch."""
    begun = time.perf_counter()
    with spend() as meter:
        written = adapted.generate(
            **batch,
            speculate=name,
            draft_length=args.draft_length,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    new = written[:, batch["input_ids"].shape[1] :]
    same = (new == plain).long().cumprod(1).sum(1)
    return {
        "drafter": name,
        "texts": len(new),
        "identical": int((same == plain.shape[1]).sum()),
        "same_tokens": same.tolist(),
        "seconds": time.perf_counter() - begun,
        "draft_bytes": meter.cost.bytes.draft,
        "bytes": meter.cost.bytes.total,
        "plain_bytes": meter.dense.bytes.total,
    } | meter.speculation.to_dict()


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    places = " ".join(f"{share:.2f}" for share in row["acceptance_by_place"])
    print(
        f"{row['kind']:14} {row['drafter']:13} identical {row['identical']}/{row['texts']}  accepted "
        f"{row['acceptance']:.3f} ({places})  {row['tokens_per_round']:.2f} tokens a round  {row['seconds']:.1f} s, "
        f"plain {row['plain_seconds']:.1f} s",
        flush=True,
    )


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


def bound(adapted: Adapted, rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """The most that the 4-bit draft could gain at some contexts, in 16-bit numbers, with the acceptance measured."""
    drafted = [row for row in rows if row["drafter"] == "self"]
    acceptance = sum(row["accepted"] for row in drafted) / sum(row["drafted"] for row in drafted)
    geometry, method = adapted.geometry, QuantSpec()
    twins = [module for module in adapted.model.modules() if isinstance(module, TwinLinear)]
    saved = sum(3 * one.weight.numel() // 2 - 4 * (one.weight.numel() // one.group_size) for one in twins)
    out = {"acceptance": acceptance}
    for past in (512, 2048, 4096, 8000):
        plain = rheostat.Method().cost(geometry, num_tokens=1, past=past).bytes.total
        body8, body4 = (method.cache_savings(geometry, past, 2, bits) for bits in (8, 4))
        out[str(past)] = speedup_bound(
            acceptance=acceptance,
            draft_length=args.draft_length,
            plain_bytes=plain,
            draft_bytes=plain - saved - body4,
            check_bytes=plain - body8,
        )
    return out


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", default="decode,perplexity,memory,bound")
    parser.add_argument("--drafters", default=",".join(DRAFTERS))
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--draft-weights", default="ffn,attention")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    found, tokenizer = rheostat.load(args.model, dtype="float32")
    adapted = found if isinstance(found, Adapted) else Adapted(found)
    weights = tuple(part for part in args.draft_weights.split(",") if part)
    method = QuantSpec(group_size=args.group_size, draft_weights=weights, remember_views=True)
    method.attach(adapted.model)
    adapted.method = Chain([adapted.method, method] if adapted.method.stages else [method])
    parts, figures = args.parts.split(","), {"settings": {k: str(v) for k, v in vars(args).items()}}
    rows: list[dict[str, Any]] = []
    if "decode" in parts:
        figures["decode"] = rows = decode(adapted, tokenizer, args)
    if "perplexity" in parts:
        figures["perplexity"] = perplexity(adapted, tokenizer, args)
        print(figures["perplexity"], flush=True)
    if "memory" in parts:
        figures["memory"] = memory(adapted, 8192)
        print(figures["memory"], flush=True)
    if "bound" in parts and rows:
        figures["bound"] = bound(adapted, rows, args)
        print(figures["bound"], flush=True)
    print(json.dumps(figures | {"provenance": provenance(seed=0)}))


if __name__ == "__main__":
    main()
