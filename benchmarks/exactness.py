"""Whether speculation writes what plain decoding writes, on real prompts: every drafter, alone and in batches.

    python benchmarks/exactness.py --model ARTIFACT --data DATA --prompts 200 --weights int8 --out exactness.jsonl

DATA has `prompts/spec_bench.jsonl.gz`. Prompts are cut, by turns, to fewer than 2G tokens and to many more, and the
text crosses at least three flushes of the cache in planes. Drafts are checked against greedy plain decoding of our own
runtime in the same format: on a full cache for `prompt_lookup` and `low_dial`, on the cache in planes for `self` and
`second_model` (the same model without its last two layers), and for `prompt_lookup` on that one too. `streaming_llm`
and `snapkv` look into a cache of `transformers`: they run there in float32, on the hierarchical cache with the same
groups, against the loop without drafts. One line of OUT for each batch; what is there is not run again. The last line
of output is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import rheostat
from rheostat.adapted import Adapted
from rheostat.caches.counting import body_length
from rheostat.caches.hierarchical import HierarchicalCache
from rheostat.provenance import provenance
from rheostat.runtime.batch import Batch
from rheostat.runtime.engine import Runtime
from rheostat.runtime.speculating import NativeHost
from rheostat.runtime.weights import CacheForm, DraftForm
from rheostat.sampling import most_likely
from rheostat.speculate.drafter import Drafter, Host, State
from rheostat.speculate.drafting import LowDial, SelfDrafter
from rheostat.speculate.lookup import PromptLookup
from rheostat.speculate.loop import Ending, speculate
from rheostat.speculate.second import SecondModel
from rheostat.speculate.sparse import SnapKV, StreamingLLM
from rheostat.speculate.stock import StockHost
from rheostat.spending import spend

PLACES = ("ffn", "attention", "head")
SIDES = "self,prompt_lookup on planes,prompt_lookup,second_model,streaming_llm,snapkv,low_dial"


class FourBits(SelfDrafter):
    """The runtime's draft form."""

    def reading(self, state: State) -> Any:
        """4 bits of everything that has them."""
        return state.host.cheaply()


@dataclass(frozen=True)
class Side:
    """A drafter, and where it runs."""

    where: str
    """`full` and `planes`: our own runtime, on that cache; `stock`: `transformers`, on the hierarchical one."""
    make: Callable[[], Drafter]


def sides(adapted: Adapted, names: list[str]) -> dict[str, Side]:
    """Those asked for that this model can have."""
    second = shortened(adapted.model) if "second_model" in names else adapted.model
    known = {
        "self": Side("planes", FourBits),
        "prompt_lookup on planes": Side("planes", PromptLookup),
        "prompt_lookup": Side("full", PromptLookup),
        "second_model": Side("planes", lambda: SecondModel(second)),
        "streaming_llm": Side("stock", StreamingLLM),
        "snapkv": Side("stock", SnapKV),
    }
    if (low := adapted.dial.low) < 1:
        known["low_dial"] = Side("full", lambda: LowDial(low))
    return {name: known[name] for name in names if name in known}


def shortened(model: PreTrainedModel, less: int = 2) -> PreTrainedModel:
    """The model without its last layers: it guesses well, and not always right."""
    second = copy.deepcopy(model)
    layers = second.get_decoder().layers
    second.get_decoder().layers = nn.ModuleList(layers[: len(layers) - less])
    second.config.num_hidden_layers -= less
    return second


@torch.inference_mode()
def write_plain(runtime: Runtime, ids: torch.Tensor, mask: torch.Tensor, number: int) -> list[list[int]]:
    """Greedy text of each row."""
    batch = Batch.read(runtime, ids, mask, {}, num_new=number)
    out = [most_likely(batch.logits)]
    while len(out) < number:
        out.append(most_likely(batch.step(out[-1], None)))
    return torch.stack(out, 1).tolist()


def write_drafted(
    adapted: Adapted, host: Host, ids: torch.Tensor, mask: torch.Tensor, drafter: Drafter, args: argparse.Namespace
) -> tuple[list[list[int]], list[int], list[int]]:
    """The same with a drafter, and how many tokens were drafted and accepted."""
    rows: list[list[int]] = [[] for _ in ids]
    with spend(keep_passes=False) as meter:
        for one in speculate(
            adapted.model,
            adapted.method,
            ids,
            mask,
            drafter=drafter,
            draft_length=args.draft_length,
            ending=Ending(max_new_tokens=args.new_tokens),
            host=host,
        ):
            for row, new in zip(rows, one.token_ids, strict=True):
                row += new.tolist()
    return rows, meter.speculation.drafted, meter.speculation.accepted


def compare(
    adapted: Adapted,
    runtime: Runtime,
    found: dict[str, Side],
    ids: torch.Tensor,
    mask: torch.Tensor,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All sides on one batch."""
    form = CacheForm(group_size=args.group_size)

    def host(where: str) -> Host:
        if where == "stock":
            cache = HierarchicalCache(adapted.model.config, group_size=args.group_size, attention_mask=mask)
            return StockHost(adapted.model, adapted.method, cache)
        runtime.cache_form = form if where == "planes" else None
        return NativeHost(runtime, adapted.settings)

    plain = {}
    for where in sorted({side.where for side in found.values()}):
        if where == "stock":
            plain[where] = write_drafted(adapted, host(where), ids, mask, Drafter(), args)[0]
        else:
            runtime.cache_form = form if where == "planes" else None
            plain[where] = write_plain(runtime, ids, mask, args.new_tokens)
    lengths = mask.sum(1).tolist()
    ends = [body_length(n + args.new_tokens - 1, args.group_size) for n in lengths]
    flushes = [(end - body_length(n, args.group_size)) // args.group_size for n, end in zip(lengths, ends, strict=True)]
    row: dict[str, Any] = {"rows": len(ids), "tokens": lengths, "flushes": min(flushes)}
    for name, side in found.items():
        text, drafted, accepted = write_drafted(adapted, host(side.where), ids, mask, side.make(), args)
        equal = sum(a == b for a, b in zip(text, plain[side.where], strict=True))
        row[name] = {"equal": equal, "drafted": sum(drafted), "accepted": sum(accepted)}
    if {"full", "planes"} <= plain.keys():
        row["planes as full"] = sum(a == b for a, b in zip(plain["planes"], plain["full"], strict=True))
    return row


def read_prompts(tokenizer: Any, args: argparse.Namespace) -> list[list[int]]:
    """Token ids, by turns cut to fewer than 2G tokens and to `args.longest`."""
    lines = gzip.decompress((args.data / "prompts/spec_bench.jsonl.gz").read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    step = max(1, len(rows) // args.prompts)
    short = 2 * args.group_size - 2
    out = []
    for i, row in enumerate(rows[::step][: args.prompts]):
        ids = tokenizer(row["turns"][0])["input_ids"]
        out.append(ids[: short - i % 5] if i % 2 else ids[: args.longest - i % 13])
    return out


def batches(prompts: list[list[int]], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and masks [size, T], padded on the left."""
    out = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in part])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
        out.append((ids, mask))
    return out


def main() -> None:
    """Run what is not there yet, and add up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", default="fp32")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--sizes", default="1,8", help="rows of a batch")
    parser.add_argument("--sides", default=SIDES)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=36)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    args = parser.parse_args()
    found, tokenizer = rheostat.load(args.model, dtype="float32")
    adapted = found if isinstance(found, Adapted) else Adapted(found)
    runtime = Runtime(adapted.model, args.weights, adapted.hook_ids, draft_form=DraftForm(places=PLACES))
    found_sides = sides(adapted, args.sides.split(","))
    done = {}
    if args.out.is_file():
        done = {(row["size"], row["number"]): row for row in map(json.loads, args.out.read_text().splitlines())}
    prompts = read_prompts(tokenizer, args)
    with args.out.open("a") as out:
        for size in map(int, args.sizes.split(",")):
            for number, (ids, mask) in enumerate(batches(prompts, size)):
                if (size, number) in done:
                    continue
                row = {"size": size, "number": number} | compare(adapted, runtime, found_sides, ids, mask, args)
                done[size, number] = row
                out.write(json.dumps(row) + "\n")
                out.flush()
    print(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}} | summary(list(done.values()))))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many texts were equal, by batch size and side; acceptance; and the fewest flushes of a text."""
    totals: Counter[str] = Counter()
    for row in rows:
        totals[f"rows, batches of {row['size']}"] += row["rows"]
        totals["planes as full"] += row.get("planes as full", 0)
        for name, one in row.items():
            if isinstance(one, dict):
                totals[f"{name}: equal, batches of {row['size']}"] += one["equal"]
                totals[f"{name}: drafted"] += one["drafted"]
                totals[f"{name}: accepted"] += one["accepted"]
    return {"fewest_flushes": min(row["flushes"] for row in rows)} | dict(totals) | {"provenance": provenance(seed=0)}


if __name__ == "__main__":
    main()
