"""Whole tasks along the dial on a tiny model."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rheostat.adapted import Adapted
from rheostat.calibration import calibrate
from rheostat.errors import SettingError
from rheostat.eval.benchmarks import TaskRun, evaluate_tasks
from rheostat.eval.tasks import TASKS
from rheostat.eval.tasks.choice import CHOICE_TASKS
from rheostat.eval.tasks.language import LANGUAGE_TASKS
from rheostat.methods import DynaMoE
from rheostat.spending import current_spending
from tests.tiny import tiny_windows

NAMES = [*CHOICE_TASKS, *LANGUAGE_TASKS]  # the files that the folder has
MODES = dict.fromkeys(NAMES, "prefill+score") | {"wikitext": "forward"}


@pytest.fixture
def adapted(reading_model) -> Adapted:
    import torch

    made = Adapted(reading_model, DynaMoE(tile=4, router_width=8, router_steps=30))
    made.method.fit(made.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    made.dial = calibrate(made, tiny_windows(seed=1))
    return made


def timeless(runs: list[TaskRun]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for run in runs for row in run.to_rows()]


def test_every_task_at_two_dials(adapted, tiny_tokenizer, data_folder):
    low = adapted.dial.low
    told = []
    runs = evaluate_tasks(
        adapted, tiny_tokenizer, NAMES, [low], folder=data_folder, progress=lambda *call: told.append(call)
    )
    assert [(run.task, run.asked) for run in runs] == [(task, at) for task in NAMES for at in (1.0, low)]
    for run in runs:
        assert run.mode == MODES[run.task]
        assert run.compute == 1.0 if run.asked == 1.0 else run.compute < 1
        assert run.flops > 0
        assert run.num_unended == 0
        for metric in run.metrics.values():
            assert math.isfinite(metric.score)
            if run.asked == 1.0:
                assert metric.difference == metric.difference_error == 0
        assert json.loads(json.dumps(run.to_rows()))[0]["metric"] in run.metrics
    assert any(metric.difference for run in runs for metric in run.metrics.values())
    by_task = {run.task: run for run in runs}
    for task, run in by_task.items():
        names = {"acc"} if task in ("boolq", "winogrande", "mmlu", "mmlu_5shot") else {"acc", "acc_norm"}
        names = {"lambada_openai": {"perplexity", "acc"}}.get(task, names)
        assert set(run.metrics) == {"wikitext": {"word_perplexity", "byte_perplexity", "bits_per_byte"}}.get(
            task, names
        )
    rows = {"hellaswag": 8, "arc_easy": 5, "arc_challenge": 3, "openbookqa": 4, "boolq": 4, "winogrande": 4, "mmlu": 6}
    rows["mmlu_5shot"] = 6
    assert {task: run.num_rows for task, run in by_task.items()} == rows | {"wikitext": 2, "lambada_openai": 6}
    assert by_task["hellaswag"].num_requests == 32
    assert by_task["hellaswag"].num_truncated > 0  # the tiny model reads 256 bytes
    assert told[-1][0] == f"lambada_openai at {low:g}"
    assert current_spending() is None


def test_scores_and_errors_by_hand(adapted, tiny_tokenizer, data_folder, ask):
    from rheostat.eval.harness import make_lm

    dense, low = evaluate_tasks(adapted, tiny_tokenizer, ["arc_easy"], [adapted.dial.low], folder=data_folder)
    task = TASKS["arc_easy"](data_folder)[0]
    lm = make_lm(adapted, tiny_tokenizer)
    hits = {}
    for run in (dense, low):
        lm.open(run.asked)
        hits[run.asked] = []
        for row in task.eval_docs:
            pairs = [(f"Question: {row['question']}\nAnswer:", f" {text}") for text in row["texts"]]
            found = lm.loglikelihood(ask("loglikelihood", pairs))
            logs = [one / len(text) for (one, _), text in zip(found, row["texts"], strict=True)]
            hits[run.asked].append(float(logs.index(max(logs)) == row["gold"]))
        metric, num = run.metrics["acc_norm"], len(hits[run.asked])
        assert metric.score == pytest.approx(sum(hits[run.asked]) / num)
        assert metric.score_error == pytest.approx(math.sqrt(metric.score * (1 - metric.score) / (num - 1)))
    gaps = [a - b for a, b in zip(hits[low.asked], hits[1.0], strict=True)]
    mean = sum(gaps) / len(gaps)
    assert low.metrics["acc_norm"].difference == pytest.approx(mean)
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
    assert low.metrics["acc_norm"].difference_error == pytest.approx(error)


def test_the_same_seed_gives_the_same_figures(adapted, tiny_tokenizer, data_folder):
    def figures() -> list[dict]:
        tasks = ["mmlu", "lambada_openai", "wikitext"]
        return timeless(evaluate_tasks(adapted, tiny_tokenizer, tasks, [0.9], folder=data_folder, limit=2, seed=3))

    assert figures() == figures()


def test_limits_and_lengths(adapted, tiny_tokenizer, data_folder):
    def first(**options) -> TaskRun:
        return evaluate_tasks(adapted, tiny_tokenizer, ["winogrande"], folder=data_folder, **options)[0]

    assert [first(limit=n).num_rows for n in (1, 3, 99)] == [1, 3, 4]
    assert first(limit=1).metrics["acc"].score_error is None
    assert first(max_length=20).num_truncated == 8 > first().num_truncated
    assert first(batch_tokens=1).metrics == first(batch_tokens=4000).metrics


def test_baselines_spend_what_the_dial_spends(adapted, tiny_tokenizer, data_folder):
    low = adapted.dial.low
    options = {"folder": data_folder, "baselines": True}
    dense, dial, static, random = evaluate_tasks(adapted, tiny_tokenizer, ["arc_easy"], [low], **options)
    assert [run.kind for run in (dense, dial, static, random)] == ["dense", "dial", "static", "random"]
    assert {run.asked for run in (dial, static, random)} == {low}
    assert static.ffn_fraction == pytest.approx(dial.ffn_fraction, abs=0.13)  # rounded up to whole slices
    assert random.ffn_fraction == pytest.approx(dial.ffn_fraction, abs=0.13)
    assert static.compute < 1
    assert len({run.flops for run in (dial, static, random)}) == 3
    assert all(run.is_choice for run in (dense, dial, static, random))
    assert not any(run.is_choice for run in evaluate_tasks(adapted, tiny_tokenizer, ["wikitext"], folder=data_folder))


def test_questions_in_the_chat_template(adapted, tiny_tokenizer, data_folder, monkeypatch):
    options = {"folder": data_folder, "chat_template": True}
    with pytest.raises(SettingError, match="chat_template=True: must be left out: this tokenizer has none"):
        evaluate_tasks(adapted, tiny_tokenizer, ["arc_easy"], **options)
    plain = evaluate_tasks(adapted, tiny_tokenizer, ["arc_easy"], folder=data_folder)[0]
    template = "{% for m in messages %}<{{m['role']}}>{{m['content']}}{% endfor %}<answer>"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    asked = evaluate_tasks(adapted, tiny_tokenizer, ["arc_easy"], **options)[0]
    assert asked.flops > plain.flops  # the template's own tokens were read too


def test_nothing_of_lm_eval_stays_changed(adapted, tiny_tokenizer, data_folder, capfd):
    from lm_eval.api import task as seam

    logger = logging.getLogger("lm_eval")
    before = seam.tqdm, logger.level
    evaluate_tasks(adapted, tiny_tokenizer, ["boolq"], folder=data_folder)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(SettingError):
        evaluate_tasks(adapted, tiny_tokenizer, ["boolq"], folder=data_folder / "nowhere")
    assert (seam.tqdm, logger.level) == before


def test_programs_are_run_only_where_that_is_allowed(adapted, tiny_tokenizer, data_folder, monkeypatch):
    from rheostat.eval.tasks.local import make_task

    config = {
        "task": "programs",
        "output_type": "generate_until",
        "unsafe_code": True,
        "doc_to_text": "text",
        "doc_to_target": "text",
        "generation_kwargs": {"until": [], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    monkeypatch.setitem(TASKS, "programs", lambda folder: [make_task(config, [{"text": "print"}])])
    with pytest.raises(SettingError, match="tasks='programs': runs programs .* --run-code"):
        evaluate_tasks(adapted, tiny_tokenizer, ["programs"], folder=data_folder)
    run = evaluate_tasks(adapted, tiny_tokenizer, ["programs"], folder=data_folder, run_code=True)[0]
    assert (run.mode, run.num_unended) == ("generate", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0: must be at least 1 row"),
        ({"computes": [0.01]}, "compute=0.01: must be between"),
        ({"tasks": []}, "must be at least one task"),
        ({"folder": None}, "task_data: must be given: boolq reads"),
        ({"tokenizer": None}, "tokenizer=None: must be the model's tokenizer"),
    ],
)
def test_bad_settings(adapted, tiny_tokenizer, data_folder, options, message):
    settings = {"tokenizer": tiny_tokenizer, "tasks": ["boolq"], "computes": [1.0], "folder": data_folder} | options
    with pytest.raises(SettingError, match=message):
        evaluate_tasks(adapted, **settings)


SHARED = ("hellaswag", "lambada_openai", "wikitext", "boolq")


@pytest.mark.slow
def test_two_processes_score_as_one(tiny_model_folder: Path, data_folder: Path, tmp_path: Path):
    def report(name: str, *launcher: str) -> list[dict]:
        out = tmp_path / name
        command = [
            "eval",
            str(tiny_model_folder),
            "--tasks=" + ",".join(SHARED),
            "--task-data",
            str(data_folder),
            "--batch-tokens",
            "200",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "rheostat", *command, "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written:") == 1  # one process speaks for both
        tasks = json.loads((out / "report.json").read_text())["tasks"]
        for row in tasks:
            assert row.pop("seconds") > 0
        return tasks

    launch = ("accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
    both = report("both", *launch, "--dynamo_backend=no", "-m")
    alone = report("alone")
    assert both == alone
    assert {task["task"]: task["rows"] for task in both} == dict(zip(SHARED, [8, 6, 2, 4], strict=True))
