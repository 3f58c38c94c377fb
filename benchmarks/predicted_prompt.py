"""What does a predicted prompt cost in quality, and what does it win in time?

    python benchmarks/predicted_prompt.py smol-kvp --data novels=a.txt,wikitext=b.txt --windows 16
    python benchmarks/predicted_prompt.py smol-kvp --time 128,512,2048 --dtype bfloat16 --rounds 5

Quality: perplexity of the tokens after a prompt, read at each depth, beside what could be had for as much or less:

- `auxiliary`: the first k layers of the model alone, with its own norm and head, for prompt and answer;
- `fitted`: the same with an affine map before the norm, solved on calibration text as the maps are;
- `pruned`: k layers spread evenly over the model alone, for prompt and answer;
- `dropped`: the whole model on as large a share of the prompt's tokens as the depth costs, drawn at random (the first
  and the last stay, positions too);
- `none`: the whole model on the prompt's last token alone.

Time: to the first token, and to several, against stock `transformers` on the same weights and against our own runtime
through all layers, interleaved, ratios round by round, each as median and quartiles; with `--beside` also the first and
the even k layers alone and a share of the tokens, on the same runtime. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from prompt_readers import even_layers, first_layers, fitted_layers

import rheostat
from rheostat import families
from rheostat.adapted import Adapted
from rheostat.provenance import provenance
from rheostat.text import pack, read_texts


def losses(model: Any, cache: Any, mask: torch.Tensor, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Nats of the last `length` tokens of [B, T], when the cache holds all before the last prompt token."""
    last = tokens[:, -length - 1 : -1]
    position_ids = torch.arange(tokens.shape[1] - length - 1, tokens.shape[1] - 1).expand(len(tokens), -1)
    mask = torch.cat([mask, torch.ones_like(last)], 1)
    out = model(input_ids=last, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
    flat = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), tokens[:, -length:].flatten())
    return flat.detach()


def read_plain(model: Any, prompts: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """All but the last prompt token through a model."""
    early = prompts[:, :-1]
    return model(input_ids=early, use_cache=True, logits_to_keep=1).past_key_values, torch.ones_like(early)


def read_dropped(
    model: Any, prompts: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[Any, torch.Tensor]:
    """A random share of the prompt's tokens, at their own positions."""
    early = prompts.shape[1] - 1
    kept = 1 + torch.randperm(early - 1, generator=generator)[: round(share * early) - 1].sort().values
    kept = torch.cat([torch.zeros(1, dtype=torch.long), kept])
    ids = prompts[:, kept]
    out = model(input_ids=ids, position_ids=kept.expand(len(ids), -1), use_cache=True, logits_to_keep=1)
    return out.past_key_values, torch.ones_like(ids)


def read_adapted(adapted: Adapted, prompts: torch.Tensor, compute: float) -> tuple[Any, torch.Tensor]:
    """The prompt through the method; the last token is read again by `losses`, so it is taken off the cache."""
    cache = adapted.method.make_cache(adapted.model)
    with rheostat.spend({"prefill": compute}):
        adapted.method.prefill(adapted.model, prompts, torch.ones_like(prompts), cache)
    cache.crop(-1)
    return cache, torch.ones_like(prompts[:, :-1])


@torch.no_grad()
def quality(
    adapted: Adapted, windows: torch.Tensor, answer: int, depths: dict[float, int], fitted: dict[int, Any]
) -> list[dict[str, Any]]:
    """Perplexity of the last `answer` tokens of windows [N, T], by reader; the first row is the dense model's."""
    model = adapted.model
    num_layers = len(families.layers(model))
    sides: dict[str, tuple[float, Callable[[torch.Tensor], tuple[Any, Any, torch.Tensor]]]] = {}

    def add(name: str, share: float, one: Any, read: Callable[[torch.Tensor], tuple[Any, torch.Tensor]]) -> None:
        sides[name] = (share, lambda prompts: (one, *read(prompts)))

    add("dense", 1.0, model, lambda p: read_plain(model, p))
    add("none", 0.0, model, lambda p: (None, p[:, :0]))
    for compute, depth in depths.items():
        first, even = first_layers(model, depth), even_layers(model, depth)
        drawn = torch.Generator().manual_seed(depth)
        add(f"predicted {depth}", compute, model, lambda p, c=compute: read_adapted(adapted, p, c))
        add(f"auxiliary {depth}", depth / num_layers, first, lambda p, m=first: read_plain(m, p))
        add(f"fitted {depth}", depth / num_layers, fitted[depth], lambda p, m=fitted[depth]: read_plain(m, p))
        add(f"pruned {depth}", depth / num_layers, even, lambda p, m=even: read_plain(m, p))
        add(f"dropped {depth}", compute, model, lambda p, c=compute, g=drawn: read_dropped(model, p, c, g))
    rows = []
    for name, (share, read) in sides.items():
        found = []
        for batch in windows.split(4):
            one, cache, mask = read(batch[:, :-answer])
            found.append(losses(one, cache, mask, batch, answer) * len(batch))
        loss = float(sum(found) / len(windows))
        ratio = 1.0 if not rows else float(torch.tensor(loss - rows[0]["loss"]).exp())
        rows.append({"reader": name, "prompt_compute": round(share, 4), "loss": loss, "ratio": round(ratio, 4)})
        print(f"{name:16s} {share:6.3f} of the prompt's compute   {ratio:7.3f} x dense perplexity", flush=True)
    return rows


Timed = dict[str, tuple[Any, dict[str, Any], float]]
"""Name of a side -> the model, what `generate` takes beside the prompt, and the share of the prompt that it reads."""


def timed_sides(adapted: Adapted, stock: Any, depths: dict[float, int], beside: set[int]) -> Timed:
    """Stock, the runtime through all layers, and each depth; on the same runtime, what else could be had at a depth."""
    sides: Timed = {"stock": (stock, {}, 1.0), "all layers": (adapted, {"compute": 1.0}, 1.0)}
    for compute, depth in depths.items():
        sides[f"depth {depth}"] = (adapted, {"compute": {"prefill": compute}}, 1.0)
        if depth in beside:
            sides[f"first {depth}"] = (Adapted(first_layers(adapted.model, depth)), {"runtime": "native"}, 1.0)
            sides[f"even {depth}"] = (Adapted(even_layers(adapted.model, depth)), {"runtime": "native"}, 1.0)
        if beside:  # which tokens are kept makes no difference to the time
            sides[f"dropped {depth}"] = (adapted, {"compute": 1.0}, compute)
    return sides


def clock(
    adapted: Adapted, sides: Timed, lengths: list[int], depths: dict[float, int], news: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Seconds to the first token and to several, sides in turns.

    Prompts are long ones cut; every call is `generate` as a whole.
    """
    rows = []
    for length in lengths:
        prompt = torch.randint(5, adapted.geometry.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
        kept: dict[tuple[str, int], list[float]] = {(name, new): [] for name in sides for new in news}
        for turn in range(rounds + 1):
            order = list(sides.items())[:: -1 if turn % 2 else 1]
            for new in news:
                for name, (model, extra, share) in order:
                    cut = prompt[:, : round(share * length)]
                    started = time.perf_counter()
                    model.generate(cut, max_new_tokens=new, min_new_tokens=new, do_sample=False, **extra)
                    if turn:
                        kept[name, new].append(time.perf_counter() - started)
        promised = _promised(adapted, length, depths)
        for new in news:
            for name in list(sides)[1:]:
                rows.append(_row(kept, name, length, new, promised.get(name) if new == 1 else None))
                print(rows[-1], flush=True)
    return rows


def _promised(adapted: Adapted, length: int, depths: dict[float, int]) -> dict[str, float]:
    """Side -> how many times fewer FLOPs than the dense model's its reading of a prompt takes."""
    dense = rheostat.Method().cost(adapted.geometry, num_tokens=length).flops.total
    found = {"all layers": 1.0}
    for compute, depth in depths.items():
        cost = adapted.method.cost(adapted.geometry, compute=min(1.0, compute + 1e-6), num_tokens=length).flops.total
        found[f"depth {depth}"] = dense / cost
    return found


def _row(
    kept: dict[tuple[str, int], list[float]], name: str, length: int, new: int, promised: float | None
) -> dict[str, Any]:
    """One side's times beside stock's and the dense runtime's, ratios taken round by round."""

    def times(other: str) -> list[float]:
        pairs = zip(kept[other, new], kept[name, new], strict=True)
        return [round(one, 3) for one in quartiles([theirs / ours for theirs, ours in pairs])]

    row = {"prompt": length, "side": name, "new": new}
    for label, side in (("stock_ms", "stock"), ("dense_ms", "all layers"), ("ms", name)):
        row[label] = [round(1000 * one, 1) for one in quartiles(kept[side, new])]
    row |= {"than_stock": times("stock"), "than_dense": times("all layers")}
    return row | ({} if promised is None else {"promised_by_flops": round(promised, 3)})


def quartiles(values: list[float]) -> list[float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def main(given: list[str]) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--data", default="", help="name=file, several separated by commas")
    parser.add_argument("--depths", default="", help="of the dial's, separated by commas (default: all)")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--time", default="", help="prompt lengths, separated by commas")
    parser.add_argument("--new", default="1,2,16,64")
    parser.add_argument("--beside", default="", help="depths at which to time the small models and dropping, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args(given)
    adapted, tokenizer = rheostat.load(args.artifact, dtype=getattr(torch, args.dtype))
    num_layers = adapted.geometry.num_layers
    dial = zip(adapted.dial.compute[1:], adapted.dial.settings["kv_prediction"][1:], strict=True)
    depths = {compute: num_layers - int(setting) for compute, setting in dial}
    if args.depths:
        depths = {c: d for c, d in depths.items() if d in {int(one) for one in args.depths.split(",")}}
    figures: dict[str, Any] = {"arguments": vars(args), "quality": {}, "time": []}
    fitted = {}
    if args.data:
        calibration = pack(tokenizer, read_texts("builtin:calibration"), length=512, limit=32, seed=args.seed)
        fitted = fitted_layers(adapted.model, depths.values(), calibration)
    for one in filter(None, args.data.split(",")):
        name, _, file = one.partition("=")
        print(f"-- {name}")
        length = args.prompt + args.answer
        windows = pack(tokenizer, read_texts(file), length=length, limit=args.windows, seed=args.seed)
        figures["quality"][name] = quality(adapted, windows, args.answer, depths, fitted)
    if args.time:
        stock = rheostat.load("smollm2-135m", dtype=getattr(torch, args.dtype))[0]
        lengths, news = ([int(one) for one in text.split(",")] for text in (args.time, args.new))
        beside = {int(one) for one in filter(None, args.beside.split(","))}
        sides = timed_sides(adapted, stock, depths, beside)
        figures["time"] = clock(adapted, sides, lengths, depths, news, args.rounds)
    figures["provenance"] = provenance(seed=args.seed, base_digest=adapted.report.get("base_digest"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
