"""A tiny model that reads bytes, a small data folder in the layout that our tasks read, and what lm-eval asks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

HELLASWAG = Path(__file__).with_name("hellaswag.jsonl")
"""The first 8 rows of HellaSwag's validation split (MIT)."""

QUESTIONS = ("Which of these is hot?", "What do plants need?", "Which one sinks?", "What is 2 + 2?", "Who can fly?")


def question(number: int) -> dict[str, Any]:
    texts = ["the sun", "light and water", f"stone {number}", "four"][: 3 + number % 2]
    labels = "ABCD" if number % 3 else "1234"
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]
    return {"question": {"stem": QUESTIONS[number], "choices": choices}, "answerKey": f"{labels[number % 3]} "}


FILES: dict[str, list[dict[str, Any]]] = {
    "mc/arc_easy_test.jsonl.gz": [question(n) for n in range(5)],
    "mc/arc_challenge_test.jsonl.gz": [question(n) for n in range(3)],
    "mc/openbookqa_test.jsonl.gz": [question(n) for n in range(4)],
    "mc/boolq_val.jsonl.gz": [
        {"passage": f"Stone {n} is heavy.", "question": f"is stone {n} heavy", "label": "true" if n % 2 else "false"}
        for n in range(4)
    ],
    "mc/winogrande_dev.jsonl.gz": [
        {
            "sentence": f"Ann met Bob, so _ smiled {n} times.",
            "option1": "Ann",
            "option2": "Bob",
            "answer": str(1 + n % 2),
        }
        for n in range(4)
    ],
    "mc/mmlu_test_sample.jsonl.gz": [
        {"subject": subject, "row": n, "question": f" {QUESTIONS[n]}", "choices": ["a", "b", "c", "d"], "answer": n}
        for subject in ("abstract_algebra", "anatomy")
        for n in range(3)
    ],
    "mc/mmlu_dev.jsonl.gz": [
        {
            "subject": subject,
            "row": n,
            "question": f"{subject[:3]}{n}",
            "choices": ["a", "b", "c", "d"],
            "answer": n % 4,
        }
        for subject in ("abstract_algebra", "anatomy")
        for n in (3, 5, 0, 1, 2, 4)
    ],
    "text/lambada_test.jsonl.gz": [{"text": f"He counted to {n}, and then he said: {n}"} for n in range(6)],
}

WIKITEXT = """\

 = Stones =

 A stone is heavy , and it sinks .

 = = Kinds = =

 There are @-@ many .
 = Birds =

 A bird is light .
"""


def pack_rows(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each task. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("tasks") / "data"
    for file, rows in FILES.items():
        pack_rows(folder, file, rows)
    pack_rows(folder, "mc/hellaswag_val.jsonl.gz", [json.loads(line) for line in HELLASWAG.read_text().splitlines()])
    (folder / "text" / "wikitext2_raw_test.txt.gz").write_bytes(gzip.compress(WIKITEXT.encode()))
    return folder


@pytest.fixture
def reading_model(tiny_model_folder: Path) -> PreTrainedModel:
    """The tiny model that reads bytes; each test has its own."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()


@pytest.fixture
def ask() -> Callable[..., list[Any]]:
    """Requests of lm-eval of one kind, from their arguments."""
    from lm_eval.api.instance import Instance

    def make(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]

    return make
