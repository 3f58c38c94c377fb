"""Quality against training tokens: the maps of a predicted prompt, and the small models that they have to beat.

    python benchmarks/trained_readers.py smol-kvp --depth 15 --tokens 10240,20480,40960,81920 --out runs \
        --data novels=a.txt,wikitext=b.txt --task-data data

Three sides, one after the other, on the same windows in the same order, all of the loss from the dense model:

- `predicted`: the maps of an adapted model; the model itself is frozen;
- `first`: the model's first k layers alone with an affine map before the norm (`fitted_layers`), all of it trained;
- `even`: k layers spread evenly over the model, alone, all trained.

Each is one run at a constant rate after a warm-up, measured at the numbers of tokens named, 0 first: perplexity after a
prompt, LAMBADA and answers from a document, beside the dense model. One JSON object a line in OUT/figures.jsonl; what
is in there is not done again, and training goes on from the last state in OUT.
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
from predicted_prompt import losses, read_plain
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
BATCH, LENGTH, WARM_UP = 4, 512, 8
CLIP = 1.0


def measure(read: Reader, texts: dict[str, torch.Tensor], asked: dict[str, list[Item]], answer: int) -> dict[str, Any]:
    """Nats a token after a prompt, by text, and each task's score."""
    row: dict[str, Any] = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name, windows in texts.items():
            found = []
            for window in windows.split(2):
                model, cache, mask = read(window[:, :-answer])
                found.append(losses(model, cache, mask, window, answer) * len(window))
            row[name] = float(sum(found) / len(windows))
        for name, one in asked.items():
            row[name] = score(one, read)
    return row


class Side:
    """What is trained, how it is read with, and its loss."""

    def __init__(self, name: str, artifact: str, depth: int, calibration: torch.Tensor) -> None:
        self.name = name
        adapted = rheostat.load(artifact, dtype=torch.float32)[0]
        learned = adapted.method.state(adapted.model)
        plain = adapted.detach()
        if name == "predicted":
            self._predict(plain, depth, {key: one for key, one in learned.items() if key.startswith(f"{depth}.")})
            return
        self.model = even_layers(plain, depth) if name == "even" else fitted_layers(plain, [depth], calibration)[depth]
        self.weights = dict(self.model.named_parameters())
        self.read: Reader = lambda prompts: (self.model, *read_plain(self.model, prompts))
        self.loss: Callable[..., torch.Tensor] = self._distilled
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

        def read(prompts: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
            cache = method.make_cache(self.model)
            with rheostat.spend(native={"kv_prediction": float(len(families.layers(self.model)) - depth)}):
                method.prefill(self.model, prompts, torch.ones_like(prompts), cache)
            cache.crop(-1)
            return self.model, cache, torch.ones_like(prompts[:, :-1])

        self.read = read

    def _distilled(self, batch: dict[str, torch.Tensor], dense: Any) -> torch.Tensor:
        with torch.no_grad():
            known = dense(**batch, use_cache=False).logits
        return language_loss(self.model(**batch, use_cache=False).logits, batch, known, 1.0)[0]


def train(
    side: Side, dense: Any, windows: torch.Tensor, stops: list[int], args: Any, measured: Callable[[int], None]
) -> None:
    """Go on from the last state to the last of `stops` (tokens), and call `measured` at each."""
    optimizer = torch.optim.AdamW(list(side.weights.values()), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    state, step = Path(args.out) / f"{side.name}.pt", 0
    if state.exists():
        held = torch.load(state)
        for name, one in side.weights.items():
            one.data.copy_(held["weights"][name])
        optimizer.load_state_dict(held["optimizer"])
        step = held["step"]
    for stop in stops:
        while step * BATCH * LENGTH < stop:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * min(1.0, (step + 1) / WARM_UP)
            torch.manual_seed(step)
            batch = {"input_ids": windows[step * BATCH : (step + 1) * BATCH]}
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = side.loss(batch, dense)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(side.weights.values()), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            seconds = time.perf_counter() - started
            print(
                f"{side.name} {step * BATCH * LENGTH} tokens, loss {float(loss):.3f}, {seconds:.0f} s", file=sys.stderr
            )
        if step * BATCH * LENGTH == stop:
            measured(stop)
            weights = {name: one.detach() for name, one in side.weights.items()}
            torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "step": step}, state)


def main(given: list[str]) -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--depth", type=int, default=15)
    parser.add_argument("--tokens", default="10240,20480,40960,81920", help=f"multiples of {BATCH * LENGTH}")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--data", required=True, help="name=file, several separated by commas")
    parser.add_argument("--task-data", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args(given)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "figures.jsonl"
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    stops = [0, *(int(one) for one in args.tokens.split(","))]
    if any(one % (BATCH * LENGTH) for one in stops):
        parser.error(f"--tokens must be multiples of {BATCH * LENGTH}")
    tokenizer = rheostat.load(args.artifact, dtype=torch.float32)[1]
    texts = {}
    for one in args.data.split(","):
        name, _, file = one.partition("=")
        texts[name] = pack(tokenizer, read_texts(file), length=512, limit=args.windows, seed=args.seed)
    asked = {name: items(tokenizer, name, Path(args.task_data), args.rows) for name in ("lambada_openai", "nq_oracle")}
    text = read_texts("builtin:calibration")
    windows = pack(tokenizer, text, length=LENGTH, limit=math.ceil(stops[-1] / LENGTH), seed=args.seed)
    calibration = pack(tokenizer, text, length=LENGTH, limit=32, seed=args.seed + 1)
    facts = provenance(seed=args.seed)

    def write(side: str, tokens: int, read: Reader) -> None:
        if any((one["side"], one["tokens"]) == (side, tokens) for one in done):
            return
        row = {"side": side, "tokens": tokens} | measure(read, texts, asked, args.answer)
        print(row, flush=True)
        with lines.open("a") as file:
            file.write(json.dumps(row | {"arguments": vars(args), "provenance": facts}) + "\n")

    for name in args.sides.split(","):
        if all(any((one["side"], one["tokens"]) == (name, stop) for one in done) for stop in stops):
            continue
        dense = rheostat.load("smollm2-135m", dtype=torch.float32)[0]
        write("dense", 0, lambda prompts, dense=dense: (dense, *read_plain(dense, prompts)))
        done.append({"side": "dense", "tokens": 0})
        side = Side(name, args.artifact, args.depth, calibration)
        train(side, dense, windows, stops, args, lambda stop, side=side: write(side.name, stop, side.read))


if __name__ == "__main__":
    main(sys.argv[1:])
