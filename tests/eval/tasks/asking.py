"""A data folder of a few rows, and what a task asks of a model and says of its answer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rheostat.eval.tasks.long import LONG_TASKS
from rheostat.eval.tasks.programs import PROGRAM_TASKS
from rheostat.eval.tasks.reading import READING_TASKS
from rheostat.eval.tasks.sums import SUM_TASKS

TASKS = READING_TASKS | SUM_TASKS | PROGRAM_TASKS | LONG_TASKS


def write_rows(folder: Path, file: str, rows: list[dict[str, Any]]) -> Path:
    """Write `folder/file`, a `.jsonl.gz`; returns the folder."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder


def build(folder: Path, name: str) -> Any:
    """The one task of a builder."""
    (task,) = TASKS[name](folder)
    return task


def requests(task: Any) -> list[Any]:
    """lm-eval's requests for all rows: `args` holds the prompt and how to generate."""
    task.build_all_requests()
    return list(task.instances)


def prompts(task: Any) -> list[str]:
    return [request.args[0] for request in requests(task)]


def score(task: Any, text: str, at: int = 0) -> dict[str, float]:
    """What the task gives for `text` as the answer to its row number `at`."""
    return dict(task.process_results(list(task.test_docs())[at], [text]))


def evaluate(task: Any, write: Callable[[str], str]) -> dict[str, float]:
    """The task's scores for a model that answers each prompt with `write(prompt)`, stop strings or no stop strings."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate as run

    class Model(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            return [write(request.args[0]) for request in requests]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    name = task.config.task
    found = run(Model(), {"tasks": {name: task}, "groups": {}}, bootstrap_iters=0, confirm_run_unsafe_code=True)
    metrics = found["results"][name]
    return {key.removesuffix(",none"): metrics[key] for key in metrics if key.endswith(",none") and "stderr" not in key}
