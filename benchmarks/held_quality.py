"""Does holding a request to what it asked for cost quality at equal spent compute?

Questions of multiple choice, scored as `rheostat eval --tasks` scores them; and chats (`--tasks chats:20`): how far a
setting's next words diverge from the dense model's along its answers. Held rows are compared with the same rows by
the dial's table alone, at two settings between which the table spends what the held rows spent; what it would
score there is taken to lie on the straight line between them, row by row. That line lies above the curve where damage
is convex, so the two are chosen close together.

    python benchmarks/held_quality.py run ARTIFACT --data FOLDER --out rows.jsonl --tasks arc_easy:200,openbookqa:200
    python benchmarks/held_quality.py show rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Question = tuple[str, list[str], int]
"""Context, choices, and which is right."""

APART = 0.012
"""How far from what held rows spent the table's two settings are to spend."""
NEW = 40
"""Tokens of an answer to a chat."""
TRIAL = 30
"""Rows from which it is told what the table spends."""


def questions(folder: Path, name: str, number: int) -> list[Question]:
    """Context, choices and the right one of the first rows of a task."""
    from rheostat.eval.tasks.choice import _arc, _hellaswag
    from rheostat.eval.tasks.local import rows

    if name == "hellaswag":
        found = [_hellaswag(row) for row in rows(folder, "mc/hellaswag_val.jsonl.gz")[:number]]
        return [(one["query"], [f" {text}" for text in one["choices"]], one["label"]) for one in found]
    if name == "openbookqa":
        found = [_arc(row) for row in rows(folder, "mc/openbookqa_test.jsonl.gz")[:number]]
        return [(one["question"], [f" {text}" for text in one["texts"]], one["gold"]) for one in found]
    found = [_arc(row) for row in rows(folder, f"mc/{name}_test.jsonl.gz")[:number]]
    return [
        (f"Question: {one['question']}\nAnswer:", [f" {text}" for text in one["texts"]], one["gold"]) for one in found
    ]


def scored(lm: Any, asked: float, is_held: bool, given: Sequence[Question]) -> dict[str, Any]:
    """What each row's choices got, in nats, and what all of it spent."""
    lm.hold = is_held
    lm.open(asked)
    pairs = [SimpleNamespace(args=(context, choice)) for context, choices, _ in given for choice in choices]
    found = iter(lm.loglikelihood(pairs))
    logs = [[next(found)[0] for _ in choices] for _, choices, _ in given]
    gold = [one[2] for one in given]
    return {"asked": asked, "held": is_held, "spent": lm.close().meter.compute, "logs": logs, "gold": gold}


def chats(folder: Path, number: int, tokenizer: Any) -> list[torch.Tensor]:
    """The first prompts of a benchmark of chats, as token ids [1, T]."""
    from rheostat.eval.tasks.local import rows

    texts = [row["turns"][0] for row in rows(folder, "prompts/vicuna_bench.jsonl.gz")[:number]]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], **options)["input_ids"] for text in texts
    ]


class Written:
    """The dense model's own answers, and how far a setting's next words are from its own along them."""

    def __init__(self, adapted: Any, prompts: list[torch.Tensor], end: int) -> None:
        self.adapted, self.prompts, self.end = adapted, prompts, end
        self.runtime = adapted.runtime("native", "auto", with_forms=True)
        self.dense = [self._walk(ids, 1.0, False, None)[0] for ids in prompts]

    def _walk(
        self, ids: torch.Tensor, asked: float, is_held: bool, dense: list[tuple[int, torch.Tensor]] | None
    ) -> tuple[list[tuple[int, torch.Tensor]], tuple[int, int]]:
        """Tokens, and the logarithms [V] of what comes in their places; FLOPs spent, and the dense model's."""
        from rheostat.runtime.batch import Batch
        from rheostat.spending import spend

        adapted, found = self.adapted, []
        with torch.inference_mode(), spend(asked, hold=is_held, keep_passes=False) as meter:
            account = adapted.account(1)
            batch = Batch.read(self.runtime, ids, None, adapted.settings("prefill", 1), num_new=NEW, account=account)
            setting = self.runtime.setting(adapted.settings("decode", 1))
            for place in range(NEW if dense is None else len(dense)):
                logs = batch.logits[0].log_softmax(-1)
                token = int(logs.argmax()) if dense is None else dense[place][0]
                found.append((token, logs.clone()))
                if token == self.end or place == NEW - 1:
                    break
                batch.step(torch.tensor([token]), setting)
            batch.settle()
        return found, (meter.cost.flops.flat, meter.dense.flops.flat)

    def score(self, asked: float, is_held: bool) -> dict[str, Any]:
        """Each chat's mean divergence, and what all of them spent."""
        rows, flops = [], np.zeros(2)
        for ids, dense in zip(self.prompts, self.dense, strict=True):
            found, spent = self._walk(ids, asked, is_held, dense)
            pairs = zip(dense, found, strict=True)
            rows.append(float(np.mean([float((a.exp() * (a - b)).sum()) for (_, a), (_, b) in pairs])))
            flops += spent
        return {"asked": asked, "held": is_held, "spent": flops[0] / flops[1], "divergence": rows}


def run(args: argparse.Namespace) -> None:
    """Score what is not in the file yet, until the time is over."""
    import rheostat
    from rheostat.eval.harness import make_lm

    began = time.monotonic()
    adapted, tokenizer = rheostat.load(args.model, dtype=args.dtype)
    lm = make_lm(adapted, tokenizer)
    done = {one["key"]: one for one in read(args.out)}

    def once(key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in done:
            if time.monotonic() - began > args.seconds:
                raise SystemExit("the time is over: run it again to go on")
            done[key] = work() | {"key": key, "task": key.split()[0]}
            with args.out.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(key, f"asked {done[key]['asked']:.3f} spent {done[key]['spent']:.4f}", flush=True)
        return done[key]

    for name, number in (spec.split(":") for spec in args.tasks.split(",")):
        if name == "chats":
            written = Written(adapted, chats(args.data, int(number), tokenizer), tokenizer.eos_token_id)
            for asked, is_held in [(0.8, True), (0.665, False), (0.7, False), (0.9, True), (0.75, False), (0.8, False)]:
                once(f"chats {'held' if is_held else 'table'} {asked}", partial(written.score, asked, is_held))
            continue
        given = questions(args.data, name, int(number))
        # The table's spending on this kind of text, so that its two settings meet what held rows spend.
        grid = np.linspace(adapted.dial.low, 0.9, 4)
        trial = [
            once(f"{name} trial {asked:.3f}", partial(scored, lm, float(asked), False, given[:TRIAL]))["spent"]
            for asked in grid
        ]
        once(f"{name} dense", partial(scored, lm, 1.0, False, given))
        for goal in args.computes:
            spent = once(f"{name} held {goal}", partial(scored, lm, goal, True, given))["spent"]
            for side in (-APART, APART):
                asked = float(np.interp(spent + side, trial, grid))
                once(f"{name} table {goal} {side}", partial(scored, lm, asked, False, given))


def read(file: Path) -> list[dict[str, Any]]:
    """What was scored."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def figures(one: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of each row: nats of the right choice below 0, its nats among the choices, and whether it is the likeliest."""
    if "divergence" in one:
        return {"divergence": np.array(one["divergence"])}
    nats = np.array([logs[gold] for logs, gold in zip(one["logs"], one["gold"], strict=True)])
    among = nats - np.array([np.logaddexp.reduce(logs) for logs in one["logs"]])
    right = np.array([int(np.argmax(logs)) == gold for logs, gold in zip(one["logs"], one["gold"], strict=True)])
    return {"nats": -nats, "among": -among, "accuracy": right.astype(float)}


def compare(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each task, setting and figure."""
    for name in dict.fromkeys(one["task"] for one in found):
        mine = [one for one in found if one["task"] == name and "trial" not in one["key"]]
        dense = next((figures(one) for one in mine if one["asked"] == 1), {})
        free = sorted((one for one in mine if not one["held"]), key=lambda one: one["spent"])
        for held in (one for one in mine if one["held"]):
            if len(free) < 2:
                continue
            place = min(max(sum(one["spent"] <= held["spent"] for one in free), 1), len(free) - 1)
            low, high = free[place - 1], free[place]
            share = (held["spent"] - low["spent"]) / (high["spent"] - low["spent"])
            if not -0.5 <= share <= 1.5:  # too far from both
                continue
            for what, rows in figures(held).items():
                table = (1 - share) * figures(low)[what] + share * figures(high)[what]
                difference = rows - table
                error = difference.std(ddof=1) / len(difference) ** 0.5
                yield f"{name} {len(rows)} rows, asked {held['asked']}, {what}:"
                plain = dense[what].mean() if what in dense else 0.0
                yield f"  dense {plain:.4f}, held {rows.mean():.4f} at {held['spent']:.4f} spent"
                yield f"  table {table.mean():.4f} there (between {low['spent']:.4f} and {high['spent']:.4f})"
                yield f"  held - table {difference.mean():+.4f} +- {error:.4f}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("run")
    one.add_argument("model")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--tasks", default="arc_easy:200,openbookqa:200")
    one.add_argument("--computes", type=lambda text: [float(part) for part in text.split(",")], default=[0.8, 0.7])
    one.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    one.add_argument("--dtype", default="bfloat16")
    kinds.add_parser("show").add_argument("file", type=Path)
    args = parser.parse_args()
    if args.kind == "run":
        run(args)
    else:
        print(*compare(read(args.file)), sep="\n")


if __name__ == "__main__":
    main()
