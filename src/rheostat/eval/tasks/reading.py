"""Answers out of memory and out of long prompts: Natural Questions and key-value retrieval.

Prompts, the measure and the 100 tokens of an answer are those of "Lost in the Middle" (Liu et al., 2023); decoding is
greedy. Generation stops at the end of the line for questions, because no more than the first line is marked.

The file of 20 documents has the published questions and passages that answer them, but other distractors, which are
easier: compare with a run on the same file, not with published figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.eval.marking import best_subspan_em, exact_match
from rheostat.eval.tasks.fields import string, strings
from rheostat.eval.tasks.local import convert, make_task, rows

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Row = dict[str, Any]
Mark = Callable[[Row, list[str]], dict[str, float]]
"""From a row and what the model wrote (one text in a list) to metric -> score."""

MAX_TOKENS = 100
QUESTION_METRICS = ("best_subspan_em", "exact_match")
NUM_DOCUMENTS = 20
GOLD_AT = (0, 4, 9, 14, 19)
"""Where the passage with the answer stands among the 20, counted from 0."""


def mean(*metrics: str) -> list[dict[str, Any]]:
    """lm-eval's description of metrics that are means over rows, more being better."""
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]


def _task(name: str, found: Sequence[Row], until: list[str], mark: Mark, *metrics: str) -> Task:
    config = {
        "task": name,
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "process_results": mark,
        "metric_list": mean(*metrics),
        "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": MAX_TOKENS},
    }
    return make_task(config, found)


def _questions(name: str, file: str, convert_row: Callable[[Row], Row]) -> Callable[[Path], list[Task]]:
    def build(folder: Path) -> list[Task]:
        found = convert(rows(folder, file), convert_row, folder / file)
        return [_task(name, found, ["\n"], _mark_question, *QUESTION_METRICS)]

    return build


def _mark_question(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    line = results[0].split("\n")[0]
    return {
        "best_subspan_em": best_subspan_em(line, row["answers"]),
        "exact_match": exact_match(line, row["answers"]),
    }


def _closed_book(row: Row) -> Row:
    return _question(f"Question: {string(row, 'question')}\nAnswer:", strings(row, "answer"))


def _oracle(row: Row) -> Row:
    return _read(row, row["ctxs"][:1])


def _question(prompt: str, answers: list[str]) -> Row:
    return {"prompt": prompt, "answers": answers, "target": answers[0]}


def _read(row: Row, documents: Sequence[Row]) -> Row:
    written = [
        f"Document [{number}](Title: {string(document, 'title')}) {string(document, 'text')}"
        for number, document in enumerate(documents, start=1)
    ]
    if not written:
        raise ValueError("ctxs is empty")
    task = (
        "Write a high-quality answer for the given question using only the provided search results "
        "(some of which might be irrelevant)."
    )
    question = f"Question: {string(row, 'question')}\nAnswer:"
    return _question("\n\n".join([task, "\n".join(written), question]), strings(row, "answers"))


def _place_gold(row: Row, at: int) -> Row:
    """The question with its gold passage, first in the file, moved to `at`; the distractors keep their order."""
    documents = list(row["ctxs"])
    if len(documents) != NUM_DOCUMENTS:
        raise ValueError(f"ctxs has {len(documents)} documents, not {NUM_DOCUMENTS}")
    if documents[0]["isgold"] is not True or any(one["isgold"] for one in documents[1:]):
        raise ValueError("ctxs must begin with its one gold document")
    documents.insert(at, documents.pop(0))
    return _read(row, documents)


def _multidoc(folder: Path) -> list[Task]:
    file = "qa/nq_multidoc20.jsonl.gz"
    found = rows(folder, file)
    tasks = []
    for at in GOLD_AT:
        placed = convert(found, lambda row, at=at: _place_gold(row, at), folder / file)  # type: ignore[misc]
        tasks.append(_task(f"nq_multidoc20_gold{at}", placed, ["\n"], _mark_question, *QUESTION_METRICS))
    return tasks


def _records(row: Row) -> Row:
    records = [(key, value) for key, value in row["ordered_kv_records"]]
    key, value = string(row, "key"), string(row, "value")
    if records.count((key, value)) != 1 or len(dict(records)) != len(records):
        raise ValueError("ordered_kv_records must hold the key once, with the value")
    lines = ",\n ".join(f'"{one}": "{other}"' for one, other in records)
    task = "Extract the value corresponding to the specified key in the JSON object below."
    parts = [task, f"JSON data:\n{{{lines}}}", f'Key: "{key}"\nCorresponding value:']
    return {"prompt": "\n\n".join(parts), "target": value}


def _retrieval(name: str, file: str) -> Callable[[Path], list[Task]]:
    def build(folder: Path) -> list[Task]:
        found = convert(rows(folder, file), _records, folder / file)
        return [_task(name, found, [], _mark_value, "accuracy")]

    return build


def _mark_value(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(row["target"].lower() in results[0].lower())}


READING_TASKS: dict[str, Callable[[Path], list[Task]]] = {
    "nq_open": _questions("nq_open", "qa/nq_open_dev.jsonl.gz", _closed_book),
    "nq_oracle": _questions("nq_oracle", "qa/nq_open_oracle.jsonl.gz", _oracle),
    "nq_multidoc20": _multidoc,
    "kv_retrieval_75": _retrieval("kv_retrieval_75", "qa/kv_retrieval_75.jsonl.gz"),
    "kv_retrieval_140": _retrieval("kv_retrieval_140", "qa/kv_retrieval_140.jsonl.gz"),
}
