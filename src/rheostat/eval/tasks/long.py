"""Long documents: seven tasks of L-Eval (An et al., 2023), a row for each question of a document. Greedy decoding.

Instructions, the 512 tokens of an answer and the measures are L-Eval's: the letter of a choice, the topic's name in the
first line, F1 of words for answers, ROUGE-L for summaries (L-Eval also reports ROUGE-1 and ROUGE-2; its judges are
not here). Our choice: "Answer:" ends every prompt, so that a model without a chat template answers too; closed
questions may take 64 tokens; no letter in the answer is wrong, where L-Eval guesses A.

Documents have 12 to 140 thousand characters (some 3 to 35 thousand tokens). The whole document goes into the prompt:
what happens to a prompt that is longer than the model's context is up to who runs the task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.errors import bad_setting
from rheostat.eval.marking import rouge_l, token_f1
from rheostat.eval.tasks.fields import string, strings
from rheostat.eval.tasks.local import convert, make_task, rows
from rheostat.eval.tasks.reading import mean

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Row = dict[str, Any]

FILE = "long/leval_subset.jsonl.gz"
EXAM = (
    "Now you are given a very long document. Please follow the instruction based on this document. For multi-choice "
    "questions, there is only a sinlge correct option. Please only provide the letter corresponding to the answer "
    "(like A or B) when answering. For other questions, please directly give the concise and accurate answer. "
)
"""With the misprint that models were given."""
TOPICS = (
    "Below is a record of our previous conversation on many different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first/second/third topic names. Now the "
    "record start. "
)
OPEN = (
    "Now you are given a very long document. Please follow the instruction after this document. These instructions may "
    "include summarizing a document, answering questions based on the document, or writing a required paragraph. "
)
STOPS = ["\nQuestion:", "\nInstruction:", "\nUSER:"]
CLOSED_TOKENS, OPEN_TOKENS = 64, 512
RIGHT_LETTER = re.compile(r"\s*\(([A-D])\)")
"""How the answers in the file begin."""
LETTER = re.compile(r"(?<![A-Za-z])[A-D](?![A-Za-z])")


def _choice_prompt(document: str, question: str, _: str) -> str:
    plea = "Please directly give answer without any additonal output or explanation "
    return f"{EXAM}Document is as follows. {document} \nQuestion: {question}.  {plea}\nAnswer:"


def _topic_prompt(document: str, question: str, _: str) -> str:
    return f"{TOPICS}{document}\n\n{question}\nAnswer:"


def _open_prompt(document: str, question: str, answer: str) -> str:
    length = len(answer.split())
    task = f"Document is as follows. {document} Instruction: {question} \nAnswer this question with {length} words."
    return f"{OPEN}{task}\nAnswer:"


def _mark_choice(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    wanted, found = RIGHT_LETTER.match(row["target"]), LETTER.search(results[0])
    return {"exact_match": float(found is not None and wanted is not None and found[0] == wanted[1])}


def _mark_topic(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    line = next((line for line in results[0].split("\n") if len(line) > 1), "")
    return {"exact_match": float(_squeezed(row["target"]) in _squeezed(line))}


def _squeezed(text: str) -> str:
    return text.lower().replace(" ", "")


def _mark_answer(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    return {"f1": token_f1(results[0], [row["target"]])}


def _mark_summary(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    return {"rouge_l": rouge_l(results[0], row["target"])}


def _document(row: Row) -> Row:
    questions, answers = strings(row, "instructions"), strings(row, "outputs")
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} instructions and {len(answers)} outputs")
    if row["task"] == "quality" and not all(RIGHT_LETTER.match(answer) for answer in answers):
        raise ValueError("an output does not begin with a letter from (A) to (D)")
    pairs = list(zip(questions, answers, strict=True))
    return {"task": string(row, "task"), "document": string(row, "input"), "pairs": pairs}


def _leval(
    task: str,
    write: Callable[[str, str, str], str],
    mark: Callable[..., dict[str, float]],
    metric: str,
    max_tokens: int,
) -> Callable[[Path], list[Task]]:
    def build(folder: Path) -> list[Task]:
        documents = [row for row in convert(rows(folder, FILE), _document, folder / FILE) if row["task"] == task]
        if not documents:
            raise bad_setting("task_data", str(folder / FILE), f"a file with documents of the task {task}")
        found = [
            {"prompt": write(row["document"], question, answer), "target": answer}
            for row in documents
            for question, answer in row["pairs"]
        ]
        config = {
            "task": f"leval_{task}",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "target",
            "process_results": mark,
            "metric_list": mean(metric),
            "generation_kwargs": {"until": STOPS, "do_sample": False, "max_gen_toks": max_tokens},
        }
        return [make_task(config, found)]

    return build


LONG_TASKS: dict[str, Callable[[Path], list[Task]]] = {
    "leval_quality": _leval("quality", _choice_prompt, _mark_choice, "exact_match", CLOSED_TOKENS),
    "leval_topic_retrieval_longchat": _leval(
        "topic_retrieval_longchat", _topic_prompt, _mark_topic, "exact_match", CLOSED_TOKENS
    ),
    "leval_natural_question": _leval("natural_question", _open_prompt, _mark_answer, "f1", OPEN_TOKENS),
    "leval_scientific_qa": _leval("scientific_qa", _open_prompt, _mark_answer, "f1", OPEN_TOKENS),
    "leval_multidoc_qa": _leval("multidoc_qa", _open_prompt, _mark_answer, "f1", OPEN_TOKENS),
    "leval_gov_report_summ": _leval("gov_report_summ", _open_prompt, _mark_summary, "rouge_l", OPEN_TOKENS),
    "leval_meeting_summ": _leval("meeting_summ", _open_prompt, _mark_summary, "rouge_l", OPEN_TOKENS),
}
