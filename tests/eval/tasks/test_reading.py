from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rheostat.errors import SettingError
from rheostat.eval.tasks.reading import GOLD_AT, READING_TASKS
from tests.eval.tasks.asking import build, evaluate, prompts, requests, score, write_rows

pytest.importorskip("lm_eval")

MULTIDOC, OPEN, KEYS = "qa/nq_multidoc20.jsonl.gz", "qa/nq_open_dev.jsonl.gz", "qa/kv_retrieval_75.jsonl.gz"


def multidoc_row(**changes: Any) -> dict[str, Any]:
    others = [{"title": f"Title {n}", "text": f"Text {n}.", "isgold": False} for n in range(1, 20)]
    gold = {"title": "Gold", "text": "Röntgen got it {question}.", "isgold": True}
    row = {"row": 0, "question": "who got it", "answers": ["Wilhelm Röntgen", "Röntgen"], "ctxs": [gold, *others]}
    return row | changes


def keys_row(**changes: Any) -> dict[str, Any]:
    return {"ordered_kv_records": [["a1", "x1"], ["b2", "y2"]], "key": "b2", "value": "y2"} | changes


def test_closed_book(tmp_path: Path):
    task = build(write_rows(tmp_path, OPEN, [{"row": 3, "question": "who wrote it", "answer": ["Bob"]}]), "nq_open")
    (request,) = requests(task)
    assert request.args == (
        "Question: who wrote it\nAnswer:",
        {"until": ["\n"], "do_sample": False, "max_gen_toks": 100},
    )
    assert score(task, " Bob.") == {"best_subspan_em": 1, "exact_match": 1}
    assert score(task, " It was Bob\nor") == {"best_subspan_em": 1, "exact_match": 0}
    assert score(task, "\nBob") == {"best_subspan_em": 0, "exact_match": 0}
    assert task.aggregation().keys() == {"best_subspan_em", "exact_match"}


def test_a_model_that_does_not_stop(tmp_path: Path):
    """It writes on over the end of the line, where the answer to another question comes up."""
    rows = [{"question": "who wrote it", "answer": ["Bob"]}, {"question": "who sang it", "answer": ["Ann"]}]
    task = build(write_rows(tmp_path, OPEN, rows), "nq_open")
    assert evaluate(task, lambda prompt: " Bob" + "\nQuestion: who?\nAnswer: Ann" * 50) == {
        "best_subspan_em": 0.5,
        "exact_match": 0.5,
    }


def test_one_document(tmp_path: Path):
    row = multidoc_row(ctxs=multidoc_row()["ctxs"][:1])
    task = build(write_rows(tmp_path, "qa/nq_open_oracle.jsonl.gz", [row]), "nq_oracle")
    assert prompts(task) == [
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\nDocument [1](Title: Gold) Röntgen got it {question}.\n\nQuestion: who got it\nAnswer:"
    ]


def test_twenty_documents_with_the_gold_one_in_five_places(tmp_path: Path):
    tasks = READING_TASKS["nq_multidoc20"](write_rows(tmp_path, MULTIDOC, [multidoc_row()]))
    assert [task.config.task for task in tasks] == [f"nq_multidoc20_gold{at}" for at in GOLD_AT]
    for at, task in zip(GOLD_AT, tasks, strict=True):
        lines = prompts(task)[0].split("\n")[2:22]
        assert [line.split("(")[0] for line in lines] == [f"Document [{n}]" for n in range(1, 21)]
        assert lines.pop(at) == f"Document [{at + 1}](Title: Gold) Röntgen got it {{question}}."
        assert [line.split(") ")[1] for line in lines] == [f"Text {n}." for n in range(1, 20)]


@pytest.mark.parametrize("name", ["kv_retrieval_75", "kv_retrieval_140"])
def test_key_value_retrieval(tmp_path: Path, name: str):
    task = build(write_rows(tmp_path, f"qa/{name}.jsonl.gz", [keys_row()]), name)
    assert prompts(task) == [
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        'JSON data:\n{"a1": "x1",\n "b2": "y2"}\n\nKey: "b2"\nCorresponding value:'
    ]
    assert score(task, ' "Y2"') == {"accuracy": 1}
    assert score(task, ' "x1"') == {"accuracy": 0}


@pytest.mark.parametrize(
    ("file", "name", "row", "message"),
    [
        (OPEN, "nq_open", {"question": "who"}, r"KeyError: 'answer'"),
        (OPEN, "nq_open", {"question": " ", "answer": ["a"]}, "question is blank"),
        (OPEN, "nq_open", {"question": None, "answer": ["a"]}, "question is of type NoneType, not a text"),
        (OPEN, "nq_open", {"question": "who", "answer": "Bob"}, "answer is of type str, not a list of texts"),
        (OPEN, "nq_open", {"question": "who", "answer": []}, "answer is empty"),
        (OPEN, "nq_open", {"question": "who", "answer": ["a", 3]}, r"answer\[1\] is of type int"),
        (MULTIDOC, "nq_multidoc20", multidoc_row(ctxs=[]), "ctxs has 0 documents, not 20"),
        (MULTIDOC, "nq_multidoc20", multidoc_row(ctxs=multidoc_row()["ctxs"][::-1]), "must begin with its one gold"),
        (MULTIDOC, "nq_multidoc20", {"question": "who"}, "KeyError: 'ctxs'"),
        (KEYS, "kv_retrieval_75", keys_row(value="x1"), "must hold the key once, with the value"),
        (KEYS, "kv_retrieval_75", keys_row(ordered_kv_records=[["b2", "y2"]] * 2), "must hold the key once"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, file: str, name: str, row: dict[str, Any], message: str):
    good = {OPEN: {"question": "who", "answer": ["Bob"]}, MULTIDOC: multidoc_row(), KEYS: keys_row()}[file]
    with pytest.raises(SettingError, match=rf"{file}, row 2'.*{message}") as error:
        READING_TASKS[name](write_rows(tmp_path, file, [good, row]))
    assert "\n" not in str(error.value)
