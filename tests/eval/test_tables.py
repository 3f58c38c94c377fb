from __future__ import annotations

import io

from rich.console import Console

from rheostat.eval.tables import task_notes, task_table


def row(kind: str, difference: float, error: float | None, **fields: object) -> dict:
    score = {"metric": "acc", "score": 0.5, "stderr": error, "paired_difference": difference, "paired_stderr": error}
    counts = {"rows": 8, "num_requests": 32, "num_truncated": 0, "num_unended": 0, "seconds": 2.0}
    spent = {"compute": 0.8, "spent": 0.75, "ffn_fraction": 0.6, "mode": "prefill+score"}
    return {"task": "hellaswag", "kind": kind, **spent, **counts, **score, **fields}


def test_the_table_of_a_task():
    task = [row("dense", 0.0, 0.125), row("dial", -0.25, None)]
    stream = io.StringIO()
    Console(file=stream, width=120).print(task_table(task))
    title, headings, dense, dial = (line.split() for line in stream.getvalue().splitlines())
    assert " ".join(title) == "hellaswag: 8 rows, prefill+score"
    assert " ".join(headings) == "run asked spent FFN metric score less dense rows/s"
    assert dense == ["dense", "0.8", "0.750", "60%", "acc", "0.5", "±", "0.12", "0", "4.0"]
    assert dial == ["dial", "0.8", "0.750", "60%", "acc", "0.5", "-0.25", "4.0"]


def test_notes():
    assert task_notes([row("dense", 0, 0)]) == []
    loud = [row("dense", 0, 0, num_truncated=3), row("dial", 0, 0, num_truncated=3, num_unended=2)]
    assert task_notes(loud) == [
        "3 of 32 contexts cut on the left to what the model reads",
        "at 0.8, the limit of tokens ended 2 answers",
    ]
