"""Sums in words: GSM8K, SVAMP and MATH-500. Greedy decoding.

- GSM8K: prompt, stop strings and the two ways to find the number are lm-eval's; the five examples are the first
  rows of the training split (lm-eval draws them). Numbers are compared as numbers: 18.00 is 18.
- SVAMP: body and question joined as in Qwen2.5-Math's evaluation; the same five examples as GSM8K (our choice).
- MATH-500: no examples, and the instruction of Qwen2.5-Math's evaluation. Only an answer in `\\boxed{}` counts,
  compared by lm-eval's own normalisation of LaTeX: another spelling of the same value can be missed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.eval.marking import last_number, marked_number
from rheostat.eval.tasks.fields import string
from rheostat.eval.tasks.local import convert, make_task, rows
from rheostat.eval.tasks.reading import mean

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Row = dict[str, Any]

EXAMPLES = "math/gsm8k_train.jsonl.gz"
NUM_EXAMPLES = 5
STOPS = ["Question:", "</s>", "<|im_end|>"]
SUM_TOKENS, PROOF_TOKENS = 256, 1024
BOX = "Please reason step by step, and put your final answer within \\boxed{}."


def _gsm8k(row: Row) -> Row:
    answer = string(row, "answer")
    number = marked_number(answer)
    if number is None:
        raise ValueError("answer does not end in #### and a number")
    return _sum(string(row, "question"), answer, number)


def _svamp(row: Row) -> Row:
    body = string(row, "Body").strip()
    body = body if body.endswith(".") else f"{body}."
    answer = row["Answer"]
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise TypeError(f"Answer is of type {type(answer).__name__}, not a number")
    # By way of the text: the shortest decimal that is the number, as it was written.
    number = Decimal(str(answer))
    return _sum(f"{body} {string(row, 'Question').strip()}", f"#### {number}", number)


def _sum(question: str, answer: str, number: Decimal) -> Row:
    return {"prompt": f"Question: {question}\nAnswer:", "target": answer, "number": str(number)}


def _mark_sum(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    wanted = Decimal(row["number"])
    return {
        "exact_match": float(last_number(results[0]) == wanted),
        "exact_match_strict": float(marked_number(results[0]) == wanted),
    }


def _sums(name: str, file: str, convert_row: Callable[[Row], Row]) -> Callable[[Path], list[Task]]:
    def build(folder: Path) -> list[Task]:
        examples = convert(rows(folder, EXAMPLES)[:NUM_EXAMPLES], _gsm8k, folder / EXAMPLES)
        config = {
            "task": name,
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "target",
            "process_results": _mark_sum,
            "metric_list": mean("exact_match", "exact_match_strict"),
            "generation_kwargs": {"until": STOPS, "do_sample": False, "max_gen_toks": SUM_TOKENS},
            "num_fewshot": len(examples),
            "fewshot_config": {"sampler": "first_n", "samples": examples},
        }
        return [make_task(config, convert(rows(folder, file), convert_row, folder / file))]

    return build


def _proof(row: Row) -> Row:
    return {"prompt": f"{string(row, 'problem')}\n{BOX}", "target": string(row, "answer")}


def _mark_proof(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

    boxed = last_boxed_only_string(results[0])
    return {"exact_match": float(boxed is not None and is_equiv(remove_boxed(boxed), row["target"]))}


def _math500(folder: Path) -> list[Task]:
    file = "math/math500.jsonl.gz"
    config = {
        "task": "math500",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "process_results": _mark_proof,
        "metric_list": mean("exact_match"),
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": PROOF_TOKENS},
    }
    return [make_task(config, convert(rows(folder, file), _proof, folder / file))]


SUM_TASKS: dict[str, Callable[[Path], list[Task]]] = {
    "gsm8k": _sums("gsm8k", "math/gsm8k_test.jsonl.gz", _gsm8k),
    "svamp": _sums("svamp", "math/svamp.jsonl.gz", _svamp),
    "math500": _math500,
}
