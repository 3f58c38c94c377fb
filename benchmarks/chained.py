"""Two methods on one dial: the joint path, and what it keeps of quality beside each method alone at as much compute.

    python benchmarks/chained.py smol-kvp smol-dial --out smol-chain --data novels=a.txt,wikitext=b.txt > chain.json

The first artifact's method and the second's are chained on the second's model; both must come from the same base. The
chain's dial is measured jointly, from settings that are even steps of the artifacts' own dials, and saved with it in
OUT; the dials of each method alone are measured on the same windows in the same way. Then, on windows of each text, a
prompt is read and an answer scored at each `compute`: by the chain, and by each method alone with the other at its
neutral setting. All sides have the same windows, and errors are of differences from the dense model window by window.

`--resume FILE` takes the dials from an earlier run's output. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import rheostat
from rheostat import joint
from rheostat.adapted import Adapted
from rheostat.dial import Dial
from rheostat.meter import Meter
from rheostat.methods import Chain
from rheostat.provenance import provenance
from rheostat.spending import in_phase
from rheostat.text import pack, read_texts

DRAWN = 16
"""Windows that are drawn of a text, however many are read: another number would draw others."""


def chain_of(folders: list[str], dtype: torch.dtype) -> tuple[Adapted, list[Dial], Any]:
    """The methods of two artifacts on the model of the second, their own dials, and the tokenizer."""
    states, methods, digests, dials, tokenizer = {}, [], [], [], None
    for folder in folders:
        adapted, tokenizer = rheostat.load(folder, dtype=dtype)
        method = adapted.method
        methods.append(method)
        dials.append(adapted.dial)
        states |= {f"{method.name}/{name}": one.clone() for name, one in method.state(adapted.model).items()}
        digests.append(adapted.report.get("base_digest"))
    if len(set(digests)) > 1:
        raise SystemExit(f"{' and '.join(folders)} were made from different models")
    plain = AutoModelForCausalLM.from_pretrained(folders[-1], dtype=dtype).eval()  # its channels in the learned order
    chain = Chain(methods)
    made = Adapted(plain, chain, report={"base_digest": digests[0]})
    chain.load_state(made.model, states)
    return made, dials, tokenizer


def measure_dials(adapted: Adapted, own: list[Dial], windows: torch.Tensor) -> dict[str, Dial]:
    """The chain's dial, and of each method alone one that was measured as the chain's was; each step is told."""

    def tell(what: str, done: int, total: int) -> None:
        print(f"{what}: {done}, {time.process_time():.0f} s of CPU", file=sys.stderr, flush=True)

    methods, answers = adapted.method.dialled(), joint.Answers(adapted, windows)
    levels = [joint.levels_of(dial, method.name) for dial, method in zip(own, methods, strict=True)]
    dials = {"chain": joint.walk(answers, methods, levels, tell)}
    for method, values in zip(methods, levels, strict=True):
        dials[method.name] = joint.walk(answers, [method], [values], tell)
    return dials


def answer_logits(adapted: Adapted, windows: torch.Tensor, answer: int) -> torch.Tensor:
    """[N, A, V]: of each of the last A tokens of windows [N, T] by what came before, the first from the prompt."""
    prompts, cache = windows[:, :-answer], adapted.method.make_cache(adapted.model)
    first = adapted.method.prefill(adapted.model, prompts, torch.ones_like(prompts), cache)
    with in_phase("decode"):
        rest = adapted(input_ids=windows[:, -answer:-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([first[:, None], rest], 1)


def settings_for(dials: dict[str, Dial], computes: list[float]) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Side, asked `compute` and native setting: the dense model first; what a dial does not reach is left out."""
    neutral = dials["chain"].native(1.0)
    yield "dense", 1.0, neutral
    for compute in computes:
        for side, dial in dials.items():
            if compute >= dial.low:
                yield side, compute, neutral | dial.native(compute)


class Side:
    """One way to read and write, and what it came to on one text."""

    def __init__(self, name: str, asked: float, native: dict[str, float]) -> None:
        self.name, self.asked, self.native = name, asked, native
        self.meter = Meter(keep_passes=False)
        self.nats: list[float] = []
        """Loss of the answer a token, by window."""
        self.apart: list[float] = []
        """Divergence from the dense model, by window."""

    @torch.no_grad()
    def take(self, adapted: Adapted, window: torch.Tensor, answer: int, dense: joint.Words | None) -> joint.Words:
        """Score one window [1, T]. Returns what the dense model says, which is this side where none is given."""
        with rheostat.spend(native=self.native, meter=self.meter):
            logits = answer_logits(adapted, window, answer)
        dense = dense or joint.Words.of(logits)
        self.nats.append(float(torch.nn.functional.cross_entropy(logits[0].float(), window[0, -answer:])))
        self.apart.append(float(dense.divergence(logits).mean()))
        return dense

    def row(self, dense: list[float]) -> dict[str, Any]:
        """Its figures beside the dense model's losses."""
        row: dict[str, Any] = {
            "side": self.name,
            "asked": self.asked,
            "native": self.native,
            "spent": round(self.meter.compute, 4),
        }
        return row | {"nats": self.nats, "apart": self.apart} | ratio(self.nats, dense)


def quality(
    adapted: Adapted, texts: dict[str, torch.Tensor], dials: dict[str, Dial], args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Of each text the rows of all sides, the dense model first. Texts and sides take turns, window by window; none is
    begun when the time is up."""
    started = time.perf_counter()
    computes = [float(one) for one in args.computes.split(",")]
    sides = {text: [Side(*one) for one in settings_for(dials, computes)] for text in texts}
    for place in range(args.first, args.first + args.windows):
        if time.perf_counter() - started > args.seconds:
            break
        for text, windows in texts.items():
            dense = None
            for side in sides[text]:
                dense = side.take(adapted, windows[place : place + 1], args.answer, dense)
    found = {text: [side.row(those[0].nats) for side in those] for text, those in sides.items()}
    for text, rows in found.items():
        for row in rows:
            told = "{side:14s} {asked:4.2f} spent {spent:.3f}: {ratio:.3f} ± {ratio_error:.3f} x dense".format(**row)
            apart = sum(row["apart"]) / len(row["apart"])
            print(f"{text:10s} {told}, {apart:.3f} nats apart, {row['native']}", flush=True)
    return found


def ratio(nats: list[float], dense: list[float]) -> dict[str, float]:
    """Perplexity as a multiple of the dense model's, and the error of that."""
    more = torch.tensor(nats, dtype=torch.float64) - torch.tensor(dense, dtype=torch.float64)
    found = math.exp(float(more.mean()))
    error = found * float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else math.nan
    return {"ratio": round(found, 4), "ratio_error": round(error, 4)}


def main(given: list[str]) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs=2)
    parser.add_argument("--held-out", default="builtin:heldout", help="text on which the dial is measured")
    parser.add_argument("--dial-windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--data", default="", help="name=file, several separated by commas")
    parser.add_argument("--windows", type=int, default=DRAWN, help=f"of each text, at most {DRAWN}")
    parser.add_argument("--first", type=int, default=0, help="window of each text to begin with")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further window is begun")
    parser.add_argument("--computes", default="0.9,0.8,0.7,0.6,0.5")
    parser.add_argument("--resume", help="output of an earlier run, to take the dials from")
    parser.add_argument("--out", help="folder for the chain")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args(given)
    adapted, own, tokenizer = chain_of(args.artifacts, getattr(torch, args.dtype))
    if args.resume:
        told = json.loads(Path(args.resume).read_text().splitlines()[-1])["dials"]
        dials = {name: Dial.from_dict(one) for name, one in told.items()}
    else:
        windows = pack(tokenizer, read_texts(args.held_out), length=args.length, limit=args.dial_windows)
        dials = measure_dials(adapted, own, windows)
    adapted.dial = dials["chain"]
    for name, dial in dials.items():
        for point, compute in enumerate(dial.compute):
            at = {one: values[point] for one, values in dial.settings.items()}
            print(f"{name:14s} {compute:.4f} {dial.measured_on['divergence'][point]:.4f} nats apart, {at}", flush=True)
    if args.out:
        rheostat.save(adapted, tokenizer, args.out)
    figures: dict[str, Any] = {"arguments": vars(args), "dials": {n: d.to_dict() for n, d in dials.items()}}
    texts = {}
    for one in filter(None, args.data.split(",")):
        name, _, file = one.partition("=")
        texts[name] = pack(tokenizer, read_texts(file), length=args.length, limit=DRAWN, seed=args.seed)
    figures["quality"] = quality(adapted, texts, dials, args)
    figures["provenance"] = provenance(seed=args.seed, base_digest=adapted.report.get("base_digest"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
