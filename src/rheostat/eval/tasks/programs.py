"""Programs: HumanEval and MBPP, one greedy try for each problem, run in the sandbox. The score is pass@1.

Prompts, examples and stop strings are lm-eval's; the variants for models that follow instructions put their code into a
Markdown fence that the prompt opens. MBPP: test split (tasks 11 to 510, as far as the file has them) after the three
prompt tasks 2, 3 and 4. A program has `SECONDS` and `MEMORY_MB`; whatever it does but pass its tests is a fail.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.errors import bad_setting
from rheostat.eval.marking import completed_program, cut, fenced_code, opened_code
from rheostat.eval.tasks.fields import string, strings
from rheostat.eval.tasks.local import convert, make_task, rows
from rheostat.eval.tasks.reading import mean

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Row = dict[str, Any]

SECONDS, MEMORY_MB = 10.0, 1024
"""For each program: processor time and address space."""
FUNCTION_TOKENS, SCRIPT_TOKENS = 1024, 512
FUNCTION_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
SCRIPT_STOP = "[DONE]"
FENCE_END = "\n```"
FIRST_TEST, LAST_TEST = 11, 510
EXAMPLES = (2, 3, 4)

logger = logging.getLogger(__name__)


def _passes(row: Mapping[str, Any], source: str) -> dict[str, float]:
    from rheostat.eval.sandbox import run_program  # late: it is for Linux, and the other tasks are not

    outcome = run_program(source, tests=row["tests"], seconds=SECONDS, memory_mb=MEMORY_MB)
    logger.debug("%s: %s %s", row["id"], outcome.status, outcome.detail)
    return {"pass@1": float(outcome.passed)}


def _config(name: str, mark: Callable[..., dict[str, float]], until: list[str], max_tokens: int) -> Row:
    return {
        "task": name,
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "process_results": mark,
        "metric_list": mean("pass@1"),
        "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": max_tokens},
        "unsafe_code": True,  # so that it only runs where the user has said so
    }


# -- HumanEval


def _function(row: Row) -> Row:
    entry_point = string(row, "entry_point")
    if not entry_point.isidentifier():
        raise ValueError(f"entry_point is {entry_point!r}, not a name")
    return {
        "id": string(row, "task_id"),
        "prompt": string(row, "prompt"),
        "code": string(row, "prompt"),
        "tests": f"{string(row, 'test')}\ncheck({entry_point})\n",
        "entry_point": entry_point,
        "target": string(row, "canonical_solution"),
    }


def _mark_function(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    return _passes(row, completed_program(row["code"], results[0], row["entry_point"], FUNCTION_STOPS))


def _humaneval(folder: Path) -> list[Task]:
    file = "code/humaneval.jsonl.gz"
    config = _config("humaneval", _mark_function, FUNCTION_STOPS, FUNCTION_TOKENS)
    return [make_task(config, convert(rows(folder, file), _function, folder / file))]


def _asked_function(row: Row) -> Row:
    found = _function(row)
    asked = "Write a solution to the following problem and make sure that it passes the tests:\n"
    return found | {"prompt": f"{asked}```python\n{found['code']}\n```\n"}


def _humaneval_instruct(folder: Path) -> list[Task]:
    file = "code/humaneval.jsonl.gz"
    config = _config("humaneval_instruct", _mark_function, FUNCTION_STOPS, FUNCTION_TOKENS) | {
        "gen_prefix": "Here is the completed function:\n```python\n{{code}}\n"
    }
    return [make_task(config, convert(rows(folder, file), _asked_function, folder / file))]


# -- MBPP


def _script(row: Row) -> Row:
    number, setup = row["task_id"], row["test_setup_code"]
    if not isinstance(number, int) or not isinstance(setup, str):
        raise TypeError("task_id must be a whole number and test_setup_code a text")
    tests = strings(row, "test_list")
    return {
        "id": f"MBPP/{number}",
        "number": number,
        "text": string(row, "text"),
        "test_list": tests,
        "tests": "\n".join([setup, *tests, ""]),
        "code": re.sub(r"\r\n?", "\n", string(row, "code")),
    }


def _plain_script(row: Row) -> Row:
    task = f"You are an expert Python programmer, and here is your task: {row['text']}"
    tests = "\n".join(row["test_list"])
    prompt = f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    return row | {"prompt": prompt, "target": f"{row['code']}\n{SCRIPT_STOP}"}


def _asked_script(row: Row) -> Row:
    task = f"You are an expert Python programmer, and here is your task:\n{row['text']}"
    tests = "\n".join(row["test_list"])
    return row | {"prompt": f"{task}\nYour code should pass these tests:\n{tests}", "target": f"{row['code']}\n```"}


def _mark_plain_script(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    written = cut(results[0], [SCRIPT_STOP])
    block = fenced_code(written)
    return _passes(row, written if block is None else block)


def _mark_asked_script(row: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    return _passes(row, opened_code(results[0]))


def _scripts(
    name: str, write: Callable[[Row], Row], mark: Callable[..., dict[str, float]], stop: str, **extra: Any
) -> Callable[[Path], list[Task]]:
    def build(folder: Path) -> list[Task]:
        file = "code/mbpp.jsonl.gz"
        found = [write(row) for row in convert(rows(folder, file), _script, folder / file)]
        examples = [row for row in found if row["number"] in EXAMPLES]
        if len(examples) != len(EXAMPLES):
            raise bad_setting("task_data", str(folder / file), f"a file with the prompt tasks {EXAMPLES}")
        config = _config(name, mark, [stop], SCRIPT_TOKENS) | {
            "target_delimiter": "",
            "num_fewshot": len(examples),
            "fewshot_config": {"sampler": "first_n", "samples": examples},
        }
        return [make_task(config | extra, [row for row in found if FIRST_TEST <= row["number"] <= LAST_TEST])]

    return build


PROGRAM_TASKS: dict[str, Callable[[Path], list[Task]]] = {
    "humaneval": _humaneval,
    "humaneval_instruct": _humaneval_instruct,
    "mbpp": _scripts("mbpp", _plain_script, _mark_plain_script, SCRIPT_STOP),
    "mbpp_instruct": _scripts(
        "mbpp_instruct", _asked_script, _mark_asked_script, FENCE_END, gen_prefix="\n```python\n"
    ),
}
