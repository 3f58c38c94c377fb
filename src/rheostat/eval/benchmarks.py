"""Benchmark tasks along the dial: lm-eval asks and scores, the model answers under `compute`.

The dense model (`compute=1.0`) answers first, and every other run is compared with it row by row.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.adapted import Adapted
from rheostat.errors import SettingError, bad_setting
from rheostat.eval.accounts import Account, Override
from rheostat.eval.harness import BATCH_TOKENS, DialLM, make_lm
from rheostat.eval.paired import difference_error, score_error
from rheostat.eval.tasks.find import find_tasks
from rheostat.eval.tasks.local import require_lm_eval
from rheostat.methods.base import Progress, no_progress
from rheostat.processes import Ranks

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of one run."""

    score: float
    score_error: float | None
    """Standard error over rows; None for a single row."""
    difference: float
    """`score` less the dense model's on the same rows."""
    difference_error: float | None
    """Standard error of `difference`, paired by row."""
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task at one setting of the dial."""

    task: str
    kind: str
    """`dense`, `dial`, or the name of a baseline at the same mean compute as the dial."""
    asked: float
    """`compute` asked for."""
    compute: float
    """`compute` spent: FLOPs in products with weights as a fraction of dense."""
    compute_with_context: float
    """All FLOPs, attention over the context included, as a fraction of dense."""
    ffn_fraction: float
    """Mean FFN width."""
    flops: int
    """Spent, in all."""
    mode: str
    """How requests were answered: `prefill+score` (context prefilled, continuation scored from the cache),
    `prefill+steps` (the same, token by token, where a method changes decoding), `forward` (one pass over plain
    text), `generate`."""
    num_rows: int
    num_requests: int
    num_truncated: int
    """Requests whose context was cut on the left, because the model cannot read it whole."""
    num_unended: int
    """Answers that the limit of tokens ended."""
    seconds: float
    metrics: Mapping[str, Metric]
    is_choice: bool
    """Whether one of several answers is chosen."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each metric, as a report holds them."""
        shared = {
            "task": self.task,
            "kind": self.kind,
            "compute": self.asked,
            "spent": self.compute,
            "rows": self.num_rows,
            "is_choice": self.is_choice,
        }
        own = ("mode", "compute_with_context", "ffn_fraction", "flops", "num_requests", "num_truncated", "num_unended")
        shared |= {name: getattr(self, name) for name in (*own, "seconds")}
        return [
            shared
            | {
                "metric": name,
                "score": metric.score,
                "stderr": metric.score_error,
                "paired_difference": metric.difference,
                "paired_stderr": metric.difference_error,
                "higher_is_better": metric.higher_is_better,
            }
            for name, metric in self.metrics.items()
        ]


def evaluate_tasks(
    adapted: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    computes: Sequence[float] = (1.0,),
    *,
    folder: Path | str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    run_code: bool = False,
    baselines: bool = False,
    chat_template: bool = False,
    ranks: Ranks | None = None,
    hold: bool = True,
    progress: Progress = no_progress,
) -> list[TaskRun]:
    """Score tasks at each `compute`; the dense model comes first in each task's runs, asked for or not.

    Args:
        tasks: names of ours (`rheostat.eval.tasks.TASKS`), or of lm-eval's own, which downloads their data.
        folder: the data folder that our tasks read.
        limit: the first rows of each task only.
        seed: of examples put before the questions, and of answers that are drawn.
        batch_tokens: padded tokens read together.
        max_length: tokens of context and answer together; left out, what the model reads.
        run_code: allow tasks that run programs which the model wrote.
        baselines: also score what the method has to beat (`Method.baselines`), at the mean compute that each setting
            of the dial really spent on the same requests.
        chat_template: put each request into the tokenizer's chat template.
        hold: steer each request by what it has spent, so that it ends at what was asked.
        ranks: the processes of `accelerate launch` (`rheostat.processes.join()`); each gets all results.

    Raises:
        SettingError: a task, a file or a setting cannot be used.
    """
    if limit is not None and limit < 1:
        raise bad_setting("limit", limit, "at least 1 row")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise bad_setting("chat_template", True, "left out: this tokenizer has none")
    asking = _Asking(limit, seed, chat_template)
    for compute in computes:
        adapted.dial.native(compute)
    with _hushed():
        found = find_tasks(tasks, None if folder is None else Path(folder))
        _check_code(found, run_code)
        lm = make_lm(
            adapted,
            tokenizer,
            batch_tokens=batch_tokens,
            max_length=max_length,
            seed=seed,
            ranks=ranks,
            hold=hold,
        )
        runs: list[TaskRun] = []
        for name, task in found.items():
            dense: _Answers | None = None
            for compute in dict.fromkeys((1.0, *computes)):
                lm.progress = functools.partial(progress, f"{name} at {compute:g}")
                answers = _ask(lm, name, task, compute, asking)
                dense = dense or answers
                runs.append(_run("dense" if compute == 1 else "dial", name, task, answers, dense))
                if not baselines or compute == 1:
                    continue
                counts = answers.account.meter.expert_counts
                for kind, override in adapted.method.baselines(adapted.model, counts, seed).items():
                    lm.progress = functools.partial(progress, f"{name} at {compute:g}, {kind}")
                    runs.append(_run(kind, name, task, _ask(lm, name, task, compute, asking, override), dense))
    return runs


@dataclass(frozen=True)
class _Asking:
    """How all runs of all tasks are asked."""

    limit: int | None
    seed: int
    chat_template: bool


@dataclass(frozen=True)
class _Answers:
    """What lm-eval made of one run of one task."""

    account: Account
    seconds: float
    scores: dict[str, float]
    """Metric -> score."""
    rows: dict[str, list[Any]]
    """Metric -> its value for each row, in the order of the rows."""
    num_rows: int


def _check_code(tasks: Mapping[str, Task], run_code: bool) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not run_code:  # set on such tasks only
            raise SettingError(f"tasks={name!r}: runs programs that the model writes; allow that with --run-code")


def _ask(
    lm: DialLM, name: str, task: Task, compute: float, asking: _Asking, override: Override | None = None
) -> _Answers:
    from lm_eval.evaluator import evaluate

    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(asking.seed)  # each run draws the same examples
    started = time.perf_counter()
    lm.open(compute, override)
    # No bootstrap: the errors are ours (`paired`), also for the difference from dense.
    found = evaluate(
        lm,
        {"tasks": {name: task}, "groups": {}},
        limit=asking.limit,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        apply_chat_template=asking.chat_template,
        fewshot_as_multiturn=asking.chat_template,
    )
    account = lm.close()
    scores = found["results"][name]
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    rows: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            rows.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return _Answers(
        account=account,
        seconds=time.perf_counter() - started,
        scores={key: float(scores[key]) for key in rows},
        rows=rows,
        num_rows=len({sample["doc_id"] for sample in samples}),
    )


def _run(kind: str, name: str, task: Task, answers: _Answers, dense: _Answers) -> TaskRun:
    account = answers.account
    return TaskRun(
        task=name,
        kind=kind,
        is_choice=task.OUTPUT_TYPE == "multiple_choice",
        asked=account.compute,
        compute=account.meter.compute,
        compute_with_context=account.meter.compute_with_context,
        ffn_fraction=account.meter.ffn_fraction,
        flops=account.meter.cost.flops.total,
        mode=", ".join(sorted(account.modes)),
        num_rows=answers.num_rows,
        num_requests=account.num_requests,
        num_truncated=account.num_truncated,
        num_unended=account.num_unended,
        seconds=answers.seconds,
        # lm-eval names a metric with its filter of answers; most tasks have the one that does nothing.
        metrics={key.removesuffix(",none"): _metric(task, key, answers, dense) for key in answers.rows},
    )


def _metric(task: Task, key: str, answers: _Answers, dense: _Answers) -> Metric:
    from lm_eval.api.metrics import mean

    name = key.rpartition(",")[0]
    aggregate = task.aggregation().get(name, mean)
    is_mean = aggregate is mean
    mine, other = answers.rows[key], dense.rows[key]
    return Metric(
        score=answers.scores[key],
        score_error=score_error(mine, aggregate, is_mean=is_mean),
        difference=answers.scores[key] - dense.scores[key],
        difference_error=difference_error(mine, other, aggregate, is_mean=is_mean),
        higher_is_better=bool(task.higher_is_better().get(name, True)),
    )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep lm-eval's advice and bars off the terminal: they speak of its own flags and loops."""
    require_lm_eval()
    from lm_eval.api import task as seam

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    bar = seam.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        seam.tqdm = functools.partial(bar, disable=True)  # it has no switch for its bars
        yield
    finally:
        seam.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
