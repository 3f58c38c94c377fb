from __future__ import annotations

import pytest

from rheostat.errors import SettingError
from rheostat.eval.tasks.choice import CHOICE_TASKS
from rheostat.eval.tasks.find import find_tasks
from rheostat.eval.tasks.language import LANGUAGE_TASKS


class Manager:
    """Stands for lm-eval's own, which reads thousands of files."""

    all_tasks = ("piqa", "hellaswag_de", "mmlu_stem")
    task_index = dict.fromkeys(all_tasks)

    def load(self, names):
        if names == ["piqa"]:
            raise ConnectionError("no\nnetwork")
        return {"tasks": {f"{names[0]}_{k}": object() for k in "ab"}, "groups": {}}


@pytest.fixture(autouse=True)
def manager(monkeypatch):
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)


def test_ours_and_stock_ones_in_order(data_folder):
    found = find_tasks(["mmlu_stem", "boolq", "arc_easy", "boolq"], data_folder)
    assert list(found) == ["mmlu_stem_a", "mmlu_stem_b", "boolq", "arc_easy"]
    assert list(find_tasks(["mmlu_stem"], None)) == ["mmlu_stem_a", "mmlu_stem_b"]


def test_every_task_of_ours_is_found(data_folder):
    names = [*CHOICE_TASKS, *LANGUAGE_TASKS]  # the files that the folder has
    assert list(find_tasks(names, data_folder)) == names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["helaswag"], "tasks='helaswag': must be one of hellaswag, arc_easy, .*; the closest is hellaswag$"),
        (["piqua"], "or a task of lm-eval; the closest is piqa$"),
        (["qqqq"], "or a task of lm-eval$"),
        (["boolq", "nonesuch"], "tasks='nonesuch'"),
        (["piqa"], r"tasks='piqa': must be a task whose data lm-eval can download \(ConnectionError: no network\)"),
    ],
)
def test_names_that_cannot_be_used(names, message, data_folder):
    with pytest.raises(SettingError, match=message):
        find_tasks(names, data_folder)


def test_the_data_folder_must_be_there(data_folder, tmp_path):
    with pytest.raises(SettingError, match="task_data: must be given: boolq reads"):
        find_tasks(["boolq"], None)
    with pytest.raises(SettingError, match="nowhere'?: must be an existing folder"):
        find_tasks(["boolq"], tmp_path / "nowhere")
    with pytest.raises(SettingError, match="must be a folder with mc/boolq_val.jsonl.gz"):
        find_tasks(["boolq"], tmp_path)
