"""Multiple choice: HellaSwag, ARC, BoolQ, WinoGrande, OpenBookQA, MMLU, prompted and scored as lm-eval's own tasks are.

The files hold the first rows of each split, so scores compare with a run on the same rows, not with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.eval.tasks.local import convert, make_task, rows

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Row = dict[str, Any]


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


ACC = [_mean("acc")]
ACC_NORM = [_mean("acc"), _mean("acc_norm")]
"""`acc_norm` divides each choice's log-likelihood by its length in characters."""


def _choice(
    name: str, file: str, convert_row: Callable[[Row], Row], order: str | None = None, **config: Any
) -> Callable[[Path], list[Task]]:
    """A builder of the task `name` over the file's rows (sorted by the field `order`), each made into what the
    templates of `config` name."""

    def build(folder: Path) -> list[Task]:
        common = {"task": name, "output_type": "multiple_choice"}
        found = rows(folder, file)
        if order is not None:
            found.sort(key=lambda row: row.get(order, 0))
        return [make_task(common | config, convert(found, convert_row, folder / file))]

    return build


def _hellaswag(row: Row) -> Row:
    # The tags of wikiHow were already taken out of this copy; what is left of lm-eval's clean-up does no harm.
    return {
        "query": _cleaned(f"{row['activity_label']}: {_capitalised(row['ctx'])}"),
        "choices": [_cleaned(ending) for ending in row["endings"]],
        "label": int(row["label"]),
    }


def _cleaned(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _capitalised(context: str) -> str:
    """The context with its last, unfinished sentence as lm-eval writes it: `ctx_b.capitalize()`.

    The file has `ctx_a` and `ctx_b` joined; the second begins in lower case, after the end of a sentence.
    """
    return re.sub(r"(?<=[.!?\"'] )[a-z][^.!?]*$", lambda found: found.group().capitalize(), context)


def _arc(row: Row) -> Row:
    choices = row["question"]["choices"]
    return {
        "question": row["question"]["stem"],
        "texts": [choice["text"] for choice in choices],
        "gold": [choice["label"] for choice in choices].index(row["answerKey"].strip()),
    }


def _boolq(row: Row) -> Row:
    label = {"false": 0, "true": 1}[str(row["label"]).lower()]
    return {"passage": row["passage"], "question": row["question"], "label": label}


def _winogrande(row: Row) -> Row:
    before, after = row["sentence"].split("_", 1)
    return {
        "number": int(row["answer"]) - 1,
        "filled": [before + row["option1"], before + row["option2"]],
        "after": after.strip(),
    }


def _number(row: Mapping[str, Any]) -> int:
    """A function, because lm-eval takes a number in the place of a text to mean: the choices are contexts."""
    return int(row["number"])


def _mmlu(row: Row) -> Row:
    subject = row["subject"].replace("_", " ")
    return {"subject": subject, "question": row["question"].strip(), "choices": row["choices"], "answer": row["answer"]}


def _mmlu_examples(folder: Path) -> dict[str, str]:
    """Subject -> its first examples, written as questions are and answered."""
    found = rows(folder, MMLU_EXAMPLES)
    found.sort(key=lambda row: row.get("row", 0))
    told: dict[str, list[str]] = {}
    for row in convert(found, _mmlu, folder / MMLU_EXAMPLES):
        lines = [
            row["question"],
            *(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)),
        ]
        told.setdefault(row["subject"], []).append("\n".join([*lines, f"Answer: {'ABCD'[row['answer']]}\n\n"]))
    return {subject: "".join(one[:NUM_EXAMPLES]) for subject, one in told.items()}


def _mmlu_with_examples(folder: Path) -> list[Task]:
    """MMLU as it is usually reported: five examples of the subject before each question.

    Written into the description, because lm-eval draws a task's examples from one list for all subjects.
    """
    examples = _mmlu_examples(folder)
    found = sorted(rows(folder, MMLU), key=lambda row: row.get("row", 0))
    asked = convert(found, lambda row: (one := _mmlu(row)) | {"examples": examples[one["subject"]]}, folder / MMLU)
    config = {"task": "mmlu_5shot", "output_type": "multiple_choice", **MMLU_CONFIG}
    return [make_task(config | {"description": MMLU_CONFIG["description"] + "{{examples}}"}, asked)]


MMLU, MMLU_EXAMPLES = "mc/mmlu_test_sample.jsonl.gz", "mc/mmlu_dev.jsonl.gz"
NUM_EXAMPLES = 5

ARC: dict[str, Any] = {
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "gold",
    "doc_to_choice": "texts",
    "metric_list": ACC_NORM,
}
LETTERS = "\n".join(f"{letter}. {{{{choices[{index}]}}}}" for index, letter in enumerate("ABCD"))

MMLU_CONFIG: dict[str, Any] = {
    "description": "The following are multiple choice questions (with answers) about {{subject}}.\n\n",
    "doc_to_text": "{{question}}\n" + LETTERS + "\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": list("ABCD"),
    "metric_list": ACC,
}

CHOICE_TASKS: dict[str, Callable[[Path], list[Task]]] = {
    "hellaswag": _choice(
        "hellaswag",
        "mc/hellaswag_val.jsonl.gz",
        _hellaswag,
        doc_to_text="query",
        doc_to_target="label",
        doc_to_choice="choices",
        metric_list=ACC_NORM,
    ),
    "arc_easy": _choice("arc_easy", "mc/arc_easy_test.jsonl.gz", _arc, **ARC),
    "arc_challenge": _choice("arc_challenge", "mc/arc_challenge_test.jsonl.gz", _arc, **ARC),
    "boolq": _choice(
        "boolq",
        "mc/boolq_val.jsonl.gz",
        _boolq,
        doc_to_text="{{passage}}\nQuestion: {{question}}?\nAnswer:",
        doc_to_target="label",
        doc_to_choice=["no", "yes"],
        metric_list=ACC,
    ),
    "winogrande": _choice(
        "winogrande",
        "mc/winogrande_dev.jsonl.gz",
        _winogrande,
        doc_to_text=_number,
        doc_to_target="after",
        doc_to_choice="filled",
        metric_list=ACC,
    ),
    "openbookqa": _choice("openbookqa", "mc/openbookqa_test.jsonl.gz", _arc, **ARC | {"doc_to_text": "question"}),
    # The file has subject after subject; in the order of rows the first ones are of all subjects.
    "mmlu": _choice("mmlu", MMLU, _mmlu, order="row", **MMLU_CONFIG),
    "mmlu_5shot": _mmlu_with_examples,
}
