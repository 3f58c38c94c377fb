from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rheostat.errors import SettingError
from rheostat.eval.tasks.long import FILE, LONG_TASKS
from tests.eval.tasks.asking import build, prompts, requests, score, write_rows

pytest.importorskip("lm_eval")

NAMES = [name.removeprefix("leval_") for name in LONG_TASKS]


def row(task: str, **changes: Any) -> dict[str, Any]:
    return {
        "task": task,
        "row": 0,
        "input": "A long {inst} document.",
        "instructions": ["First?\n (A) yes \n (B) no", "Second?"],
        "outputs": ["(B) no", "A fox ran over the hill"],
        "source": task,
        "evaluation": "f1",
    } | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path,
        FILE,
        [row(name) for name in NAMES if name != "quality"] + [row("quality", outputs=["(B) no", "(C) A third"])],
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_question_is_a_row(folder: Path, name: str):
    task = build(folder, f"leval_{name}")
    assert task.config.task == f"leval_{name}"
    assert len(prompts(task)) == 2
    for prompt, question in zip(prompts(task), ["First?", "Second?"], strict=True):
        assert "A long {inst} document." in prompt
        assert prompt.index("document.") < prompt.index(question)
        assert prompt.endswith("\nAnswer:")
    how = requests(task)[0].args[1]
    assert how["do_sample"] is False
    assert how["max_gen_toks"] == (64 if name in ("quality", "topic_retrieval_longchat") else 512)


def test_open_questions_say_how_long(folder: Path):
    prompt = prompts(build(folder, "leval_scientific_qa"))[1]
    assert prompt.endswith("Instruction: Second? \nAnswer this question with 6 words.\nAnswer:")


@pytest.mark.parametrize(
    ("text", "is_right"),
    [(" (B) no", 1), ("B", 1), ("Because of this: B", 1), (" A, not B", 0), ("no", 0), ("BAD", 0), ("", 0)],
)
def test_choices(folder: Path, text: str, is_right: int):
    assert score(build(folder, "leval_quality"), text) == {"exact_match": is_right}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [("\n\nThe topic: a FOX ran  over the hill.", 1), ("No.\nA fox ran over the hill", 0), ("", 0), ("A fox", 0)],
)
def test_topics(folder: Path, text: str, is_right: int):
    assert score(build(folder, "leval_topic_retrieval_longchat"), text, at=1) == {"exact_match": is_right}


def test_answers_and_summaries(folder: Path):
    assert score(build(folder, "leval_multidoc_qa"), "the fox ran", at=1) == {"f1": pytest.approx(2 * 2 / (2 + 4))}
    assert score(build(folder, "leval_meeting_summ"), "Hill fox ran", at=1) == {"rouge_l": pytest.approx(2 * 2 / 9)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("quality")], "row 1'.*an output does not begin with a letter"),
        ([row("quality", outputs=["(A)"])], "row 1'.*2 instructions and 1 outputs"),
        ([row("multidoc_qa"), {"task": "quality"}], "row 2'.*KeyError: 'instructions'"),
        ([row("multidoc_qa")], "a file with documents of the task quality"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str):
    with pytest.raises(SettingError, match=f"leval_subset.jsonl.gz.*{message}"):
        build(write_rows(tmp_path, FILE, rows), "leval_quality")
