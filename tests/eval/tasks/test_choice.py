"""The prompts of our tasks, beside those that lm-eval's own configurations make of the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from rheostat.errors import SettingError
from rheostat.eval.tasks import TASKS
from rheostat.eval.tasks.choice import CHOICE_TASKS
from tests.eval.conftest import pack_rows


def requests(task) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def built(name: str, folder: Path):
    (task,) = TASKS[name](folder)
    assert task.task_name == name
    return task


PROMPTS = {
    "hellaswag": ("Roof shingle removal: A man is sitting on a roof. He", " is ripping level tiles off.", 3),
    "arc_easy": ("Question: Which of these is hot?\nAnswer:", " light and water", 0),
    "arc_challenge": ("Question: Which of these is hot?\nAnswer:", " light and water", 0),
    "openbookqa": ("Which of these is hot?", " light and water", 0),
    "boolq": ("Stone 0 is heavy.\nQuestion: is stone 0 heavy?\nAnswer:", " yes", 0),
    "mmlu": (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Which of these is hot?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        " B",
        0,
    ),
    "mmlu_5shot": (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        + "".join(f"abs{n}\nA. a\nB. b\nC. c\nD. d\nAnswer: {'ABCDA'[n]}\n\n" for n in range(5))
        + "Which of these is hot?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        " B",
        0,
    ),
}


def test_each_task_has_a_case():
    assert {*PROMPTS, "winogrande"} == set(CHOICE_TASKS)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, data_folder):
    context, second, gold = PROMPTS[name]
    task = built(name, data_folder)
    asked = requests(task)
    assert asked[1] == (context, second)
    assert asked[0][0] == context
    assert task.doc_to_target(task.eval_docs[0]) == gold


def test_winogrande_puts_the_choices_into_the_context(data_folder):
    task = built("winogrande", data_folder)
    asked = requests(task)
    assert asked[:2] == [(f"Ann met Bob, so {name}", " smiled 0 times.") for name in ("Ann", "Bob")]
    right = [task.doc_to_text(row) for row in task.eval_docs]
    assert right == [0, 1, 0, 1]


def test_right_answers(data_folder):
    assert [row["gold"] for row in built("arc_easy", data_folder).eval_docs] == [0, 1, 2, 0, 1]
    assert [row["label"] for row in built("boolq", data_folder).eval_docs] == [0, 1, 0, 1]


def test_mmlu_takes_its_subjects_in_turns(data_folder):
    subjects = [row["subject"] for row in built("mmlu", data_folder).eval_docs]
    assert subjects == ["abstract algebra", "anatomy"] * 3


def test_mmlu_examples_are_of_the_questions_subject(data_folder):
    task = built("mmlu_5shot", data_folder)
    second = requests(task)[4][0]
    assert "about anatomy" in second
    assert second.count("ana") == 1 + 5
    assert "abs" not in second


def test_a_subject_without_examples_is_named(data_folder, tmp_path):
    for file in ("mc/mmlu_test_sample.jsonl.gz", "mc/mmlu_dev.jsonl.gz"):
        (tmp_path / "mc").mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((data_folder / file).read_bytes())
    pack_rows(
        tmp_path, "mc/mmlu_dev.jsonl.gz", [{"subject": "law", "question": "q", "choices": list("abcd"), "answer": 0}]
    )
    with pytest.raises(SettingError, match="'abstract algebra'"):
        TASKS["mmlu_5shot"](tmp_path)


def test_hellaswag_contexts_end_as_lm_eval_writes_them(tmp_path):
    rows = [
        {
            "activity_label": "Baking",
            "ctx": "He bakes. she adds [sub] Milk  and",
            "endings": ["a [title] b"] * 4,
            "label": n,
        }
        for n in range(2)
    ]
    pack_rows(tmp_path, "mc/hellaswag_val.jsonl.gz", rows)
    assert requests(built("hellaswag", tmp_path))[0] == ("Baking: He bakes. She adds milk and", " a. b")


STOCK = {
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/mmlu_anatomy.yaml",
    "mmlu_5shot": "mmlu/default/mmlu_anatomy.yaml",
}


@pytest.mark.parametrize("name", STOCK)
def test_kinds_and_metrics_are_those_of_lm_eval(name, data_folder):
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = load_yaml(Path(lm_eval.tasks.__file__).parent / STOCK[name], resolve_func=False, recursive=True)
    config = built(name, data_folder).config
    assert config.output_type == stock["output_type"]
    assert [one["metric"] for one in config.metric_list] == [one["metric"] for one in stock["metric_list"]]
    assert config.num_fewshot == 0 == stock.get("num_fewshot", 0)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("hellaswag", {"activity_label": "x"}),
        ("arc_easy", {"question": {"stem": "x", "choices": []}, "answerKey": "A"}),
        ("boolq", {"passage": "x", "question": "y", "label": "maybe"}),
        ("winogrande", {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}),
        ("mmlu", {"question": None}),
    ],
)
def test_rows_of_another_task_are_refused(name, row, tmp_path):
    files = {"hellaswag": "hellaswag_val", "arc_easy": "arc_easy_test", "boolq": "boolq_val"}
    files |= {"winogrande": "winogrande_dev", "mmlu": "mmlu_test_sample"}
    pack_rows(tmp_path, f"mc/{files[name]}.jsonl.gz", [row])
    with pytest.raises(SettingError, match=rf"{files[name]}.jsonl.gz, row 1'?: must be a row of this task"):
        TASKS[name](tmp_path)
