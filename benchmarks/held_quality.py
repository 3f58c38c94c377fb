"""Does holding a request to what it asked for cost quality at equal spent compute?

Questions of multiple choice, scored as `rheostat eval --tasks` scores them. Held rows are compared with the same rows
by the dial's table alone, at two settings between which the table spends what the held rows spent; what it would
score there is taken to lie on the straight line between them, row by row. That line lies above the curve where damage
is convex, so the two are chosen close together.

    python benchmarks/held_quality.py run ARTIFACT --data FOLDER --out rows.jsonl --tasks arc_easy:200,openbookqa:200
    python benchmarks/held_quality.py show rows.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

APART = 0.012
"""How far from what held rows spent the table's two settings are to spend."""
TRIAL = 30
"""Rows from which it is told what the table spends."""


def questions(folder: Path, name: str, number: int) -> list[tuple[str, list[str], int]]:
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


def scored(lm: Any, asked: float, is_held: bool, given: Sequence[tuple[str, list[str], int]]) -> dict[str, Any]:
    """What each row's choices got, in nats, and what all of it spent."""
    lm.hold = is_held
    lm.open(asked)
    pairs = [SimpleNamespace(args=(context, choice)) for context, choices, _ in given for choice in choices]
    found = iter(lm.loglikelihood(pairs))
    logs = [[next(found)[0] for _ in choices] for _, choices, _ in given]
    return {"asked": asked, "held": is_held, "spent": lm.close().meter.compute, "logs": logs}


def run(args: argparse.Namespace) -> None:
    """Score all that is not in the file yet."""
    import rheostat
    from rheostat.eval.harness import make_lm

    adapted, tokenizer = rheostat.load(args.model, dtype=args.dtype)
    lm = make_lm(adapted, tokenizer)
    for spec in args.tasks.split(","):
        name, number = spec.split(":")
        given = questions(args.data, name, int(number))
        gold = [one[2] for one in given]
        low = adapted.dial.low
        grid = np.linspace(low, 0.9, 5)
        # The table's spending on this kind of text, so that its two settings meet what held rows spend.
        trial = [scored(lm, float(asked), False, given[:TRIAL])["spent"] for asked in grid]

        def write(
            asked: float, is_held: bool, goal: float, name: str = name, given: Any = given, gold: Any = gold
        ) -> float:
            one = scored(lm, asked, is_held, given) | {"task": name, "gold": gold, "goal": goal}
            with args.out.open("a") as file:
                file.write(json.dumps(one) + "\n")
            print(name, f"asked {asked:.3f} held {is_held} spent {one['spent']:.4f}", flush=True)
            return float(one["spent"])

        write(1.0, False, 1.0)
        for goal in args.computes:
            spent = write(goal, True, goal)
            for side in (-APART, APART):
                write(float(np.interp(spent + side, trial, grid)), False, goal)


def figures(one: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of each row: nats of the right choice below 0, its nats among the choices, and whether it is the likeliest."""
    nats = np.array([logs[gold] for logs, gold in zip(one["logs"], one["gold"], strict=True)])
    among = nats - np.array([np.logaddexp.reduce(logs) for logs in one["logs"]])
    right = np.array([int(np.argmax(logs)) == gold for logs, gold in zip(one["logs"], one["gold"], strict=True)])
    return {"nats": -nats, "among": -among, "accuracy": right.astype(float)}


def compare(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each task, setting and figure."""
    for name in dict.fromkeys(one["task"] for one in found):
        mine = [one for one in found if one["task"] == name]
        dense = figures(next(one for one in mine if one["asked"] == 1))
        free = sorted((one for one in mine if not one["held"]), key=lambda one: one["spent"])
        for held in (one for one in mine if one["held"]):
            below = [one for one in free if one["spent"] <= held["spent"]] or free[:1]
            above = [one for one in free if one["spent"] > held["spent"]]
            low, high = below[-1], above[0]
            share = (held["spent"] - low["spent"]) / (high["spent"] - low["spent"])
            for what, rows in figures(held).items():
                table = (1 - share) * figures(low)[what] + share * figures(high)[what]
                difference = rows - table
                error = difference.std(ddof=1) / len(difference) ** 0.5
                yield (
                    f"{name} {len(rows)} rows, asked {held['asked']}, spent {held['spent']:.4f} "
                    f"(table {low['spent']:.4f} to {high['spent']:.4f}), {what}: dense {dense[what].mean():.4f}, table {table.mean():.4f}, "
                    f"held {rows.mean():.4f}, held - table {difference.mean():+.4f} +- {error:.4f}"
                )


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
    one.add_argument("--dtype", default="bfloat16")
    kinds.add_parser("show").add_argument("file", type=Path)
    args = parser.parse_args()
    if args.kind == "run":
        run(args)
    else:
        print(*compare([json.loads(line) for line in args.file.read_text().splitlines()]), sep="\n")


if __name__ == "__main__":
    main()
