"""Quality against training tokens: the maps of a predicted prompt, and the small models that they have to beat.

    python benchmarks/trained_readers.py train smol-kvp --depth 15 --tokens 8192,16384,32768 --out runs
    python benchmarks/trained_readers.py measure smol-kvp --depth 15 --out runs --data novels=a.txt,wikitext=b.txt \
        --task-data data

Three sides, on the same batches in the same order, all of the loss from the dense model:

- `predicted`: the maps of an adapted model; the model itself is frozen;
- `first`: the model's first k layers alone with an affine map before the norm (`fitted_layers`), all of it trained;
- `even`: k layers spread evenly over the model, alone, all trained.

`train` takes each batch through all sides, so that they share the dense model's pass, at a constant rate after a
warm-up; it goes on from the last state in OUT, and after `--seconds` it stops. `measure` takes what is there:
perplexity after a prompt at each stop, nats of right answers at the last stop (with `--every` at each; of `predicted`
before the first step, too), beside the dense model's and those after a random share of the prompt's tokens. It writes
one JSON object a line to OUT/figures.jsonl; what is in there is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from predicted_prompt import losses, read_dropped, read_plain
from prompt_answers import Item, Reader, items, score
from prompt_readers import even_layers, fitted_layers

import rheostat
from rheostat import families
from rheostat.adapted import Adapted
from rheostat.losses import language_loss
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.provenance import provenance
from rheostat.text import pack, read_texts

SIDES = ("predicted", "first", "even")
BATCH, LENGTH, WARM_UP = 2, 512, 4
CLIP = 1.0
CALIBRATION = "builtin:calibration"
DRAWN = 16
"""Windows that are drawn of a text, however many are read: another number would draw others."""


class Side:
    """What is trained, how it is read with, and its loss."""

    def __init__(self, name: str, artifact: str, depth: int, calibration: torch.Tensor) -> None:
        self.name = name
        self.passes: list[torch.Tensor] = []
        """Of the predicted side: logits of each pass of the newest step; the first is the dense model's."""
        adapted = rheostat.load(artifact, dtype=torch.float32)[0]
        learned = adapted.method.state(adapted.model)
        plain = adapted.detach()
        if name == "predicted":
            self._predict(plain, depth, {key: one for key, one in learned.items() if key.startswith(f"{depth}.")})
            return
        self.model = even_layers(plain, depth) if name == "even" else fitted_layers(plain, [depth], calibration)[depth]
        self.weights = dict(self.model.named_parameters())
        self.read: Reader = lambda prompts: (self.model, *read_plain(self.model, prompts))
        self.loss: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor] = self._distilled
        self.model.requires_grad_(True)

    def _predict(self, plain: Any, depth: int, learned: dict[str, torch.Tensor]) -> None:
        """The recipe's own method (`recipes/kvp_cpu.yaml`), at one depth, with the maps that were learned for it."""
        weights = {"distill_weight": 1.0, "consistency_weight": 0.1, "answer_share": 0.5}
        method = KVPrediction(depths=(depth,), exact_tokens=16, **weights)
        self.model = Adapted(plain, method).model
        method.load_state(self.model, learned)
        self.model.requires_grad_(False)
        named = dict(self.model.named_parameters())
        self.weights = {one: named[one].requires_grad_(True) for one in method.trainable(self.model)}
        self.loss = lambda batch, dense: method.loss(self.model, batch)[0]
        self.model.register_forward_hook(lambda module, given, out: self.passes.append(out.logits.detach()))

        def read(prompts: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
            cache = method.make_cache(self.model)
            with rheostat.spend(native={"kv_prediction": float(len(families.layers(self.model)) - depth)}):
                method.prefill(self.model, prompts, torch.ones_like(prompts), cache)
            cache.crop(-1)
            return self.model, cache, torch.ones_like(prompts[:, :-1])

        self.read = read

    def _distilled(self, batch: dict[str, torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
        return language_loss(self.model(**batch, use_cache=False).logits, batch, dense, 1.0)[0]

    def file(self, folder: Path, tokens: int) -> Path:
        """Where the weights are after so many tokens."""
        return folder / f"{self.name}-{tokens}.pt"

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the weights."""
        for name, one in self.weights.items():
            one.data.copy_(weights[name])


class Trainer:
    """One side and its optimiser."""

    def __init__(self, side: Side, rate: float, folder: Path) -> None:
        self.side, self.rate, self.folder, self.step = side, rate, folder, 0
        self.weights = list(side.weights.values())
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        if (state := folder / f"{side.name}.pt").exists():
            held = torch.load(state)
            side.put(held["weights"])
            self.optimizer.load_state_dict(held["optimizer"])
            self.step = held["step"]

    def take(self, batch: dict[str, torch.Tensor], dense: torch.Tensor) -> float:
        """One step. Returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / WARM_UP)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.side.loss(batch, dense)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(loss.detach())

    def save(self, *, is_stop: bool) -> None:
        """The state to go on from; at a stop the weights to be measured, too."""
        weights = {name: one.detach() for name, one in self.side.weights.items()}
        held = {"weights": weights, "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(held, self.folder / f"{self.side.name}.pt")
        if is_stop:
            half = {name: one.bfloat16() for name, one in weights.items()}
            torch.save(half, self.side.file(self.folder, self.step * BATCH * LENGTH))


def train(sides: list[Side], args: Any, stops: list[int], windows: torch.Tensor, folder: Path) -> None:
    """Go on from the last state to the last of `stops` (tokens), or until the time is up."""
    started = time.perf_counter()
    is_shared = sides[0].name == "predicted"  # its loss begins with a pass of the dense model
    dense = None if is_shared else rheostat.load("smollm2-135m", dtype=torch.bfloat16)[0]
    known = torch.empty(0)
    rates = {"predicted": args.rate}
    trainers = [Trainer(side, rates.get(side.name, args.small_rate), folder) for side in sides]
    steps = {one.step for one in trainers}
    if len(steps) > 1:
        raise SystemExit(f"{folder}: its sides have taken {steps} steps; train those alone that are behind")
    seen = []  # seconds of each step
    for step in range(trainers[0].step, stops[-1] // (BATCH * LENGTH)):
        if time.perf_counter() - started + 1.2 * max(seen, default=0.0) > args.seconds:
            break
        begun = time.perf_counter()
        batch = {"input_ids": windows[step * BATCH : (step + 1) * BATCH]}
        if not is_shared:
            with torch.no_grad():
                known = dense(**batch, use_cache=False).logits
        found = {}
        for one in trainers:
            torch.manual_seed(step)
            found[one.side.name] = round(one.take(batch, known), 3)
            if one.side.passes:
                known = one.side.passes[0]
                one.side.passes.clear()
        seen.append(time.perf_counter() - begun)
        tokens = (step + 1) * BATCH * LENGTH
        print(f"{tokens} tokens, losses {found}, {seen[-1]:.1f} s", file=sys.stderr, flush=True)
        if tokens in stops:
            for one in trainers:
                one.save(is_stop=True)
    for one in trainers:
        one.save(is_stop=False)


def measure(read: Reader, texts: dict[str, torch.Tensor], asked: dict[str, list[Item]], answer: int) -> dict[str, Any]:
    """Nats a token after a prompt, by text and window; each task's nats, by question."""
    row: dict[str, Any] = {}
    with torch.no_grad():
        for name, windows in texts.items():
            row[name] = [float(losses(*read(one[:, :-answer]), one, answer)) for one in windows.split(1)]
        for name, questions in asked.items():
            row[name] = [score([one], read) for one in questions]
    return row


def measure_all(sides: list[Side], args: Any, stops: list[int], folder: Path) -> None:
    """Of each side at each stop that has been reached: a line in the folder's figures."""
    lines = folder / "figures.jsonl"
    held = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(one["side"], one["tokens"]) for one in held}
    tokenizer = rheostat.load(args.artifact, dtype=torch.float32)[1]
    texts = {}
    for one in args.data.split(","):
        name, _, file = one.partition("=")
        texts[name] = pack(tokenizer, read_texts(file), length=512, limit=DRAWN, seed=args.seed)[: args.windows]
    asked = {}
    for one in args.tasks.split(","):
        name, _, rows = one.partition("=")
        first, _, last = rows.partition(":")
        asked[name] = items(tokenizer, name, Path(args.task_data), int(last) - int(first), int(first))
    facts = provenance(seed=args.seed)

    def write(side: str, tokens: int, read: Reader) -> None:
        is_asked = args.every or tokens == stops[-1] or (not tokens and side not in SIDES[1:])
        chosen = asked if is_asked else {}
        row = {"side": side, "tokens": tokens} | measure(read, texts, chosen, args.answer)
        print(side, tokens, {name: round(sum(row[name]) / len(row[name]), 4) for name in texts}, flush=True)
        with lines.open("a") as file:
            file.write(json.dumps(row | {"arguments": vars(args), "provenance": facts}) + "\n")

    for side in sides:
        side.model.bfloat16()
    dense = rheostat.load("smollm2-135m", dtype=torch.bfloat16)[0]
    drawn = torch.Generator().manual_seed(args.seed)
    others: dict[str, Reader] = {
        "dense": lambda prompts: (dense, *read_plain(dense, prompts)),
        "dropped": lambda prompts: (dense, *read_dropped(dense, prompts, args.share, drawn)),
    }
    for name, read in others.items():
        if (name, 0) not in done:
            write(name, 0, read)
    for stop in reversed(stops):  # the last says most
        for side in sides:
            is_there = not stop or side.file(folder, stop).exists()
            if is_there and (side.name, stop) not in done:
                side.put(torch.load(side.file(folder, stop)))
                write(side.name, stop, side.read)


def main(given: list[str]) -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("artifact")
    parser.add_argument("--depth", type=int, default=15)
    parser.add_argument("--tokens", default="8192,16384,32768", help=f"multiples of {BATCH * LENGTH}")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rate", type=float, default=3e-4, help="of the maps")
    parser.add_argument("--small-rate", type=float, default=3e-4, help="of the small models")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of training, in this call")
    parser.add_argument("--data", help="name=file, several separated by commas")
    parser.add_argument("--task-data")
    parser.add_argument("--tasks", default="lambada_openai=0:40,nq_oracle=0:40", help="name=rows, as Python's slices")
    parser.add_argument("--every", action="store_true", help="ask the tasks' questions at every stop")
    parser.add_argument("--windows", type=int, default=8, help=f"of each text, at most {DRAWN}")
    parser.add_argument("--share", type=float, default=0.55, help="of a prompt's tokens that random dropping leaves")
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args(given)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    stops = [0, *(int(one) for one in args.tokens.split(","))]
    if any(one % (BATCH * LENGTH) for one in stops):
        parser.error(f"--tokens must be multiples of {BATCH * LENGTH}")
    tokenizer = rheostat.load(args.artifact, dtype=torch.float32)[1]
    text = read_texts(CALIBRATION)
    calibration = pack(tokenizer, text, length=LENGTH, limit=32, seed=args.seed + 1)
    sides = []
    for name in args.sides.split(","):
        is_known = (folder / f"{name}-0.pt").exists()
        with torch.autocast("cpu", torch.bfloat16):
            side = Side(name, args.artifact, args.depth, calibration[:1] if is_known else calibration)
        sides.append(side)
        if is_known:
            side.put(torch.load(side.file(folder, 0)))
        else:
            torch.save({name: one.detach().bfloat16() for name, one in side.weights.items()}, side.file(folder, 0))
    if args.what == "measure":
        measure_all(sides, args, stops, folder)
        return
    windows = pack(tokenizer, text, length=LENGTH, limit=math.ceil(stops[-1] / LENGTH), seed=args.seed)
    train(sides, args, stops, windows, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
