"""From the names that a user gives to tasks: ours over a data folder, and lm-eval's own, which it downloads."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rheostat.errors import SettingError, bad_setting
from rheostat.eval.tasks import TASKS
from rheostat.eval.tasks.local import require_lm_eval

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def find_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Task]:
    """The tasks by name, in order; each name once. A group of lm-eval gives all its tasks.

    Args:
        folder: the data folder that our own tasks read; may be left out where none of them is asked for.

    Raises:
        SettingError: a name is unknown, a file is missing, or lm-eval cannot load the task's data.
    """
    require_lm_eval()
    if not names:
        raise bad_setting("tasks", (), f"at least one task: {', '.join(TASKS)}")
    if folder is not None and not folder.is_dir():
        raise bad_setting("task_data", str(folder), "an existing folder")
    # Ours are built last: stock names are checked, so that a typing error is told before files are read.
    stock = _stock([name for name in names if name not in TASKS])
    tasks: dict[str, Task] = {}
    for name in dict.fromkeys(names):
        if name not in TASKS:
            tasks |= stock[name]
        elif folder is None:
            raise SettingError(f"task_data: must be given: {name} reads its rows from files of a data folder")
        else:
            tasks |= {task.task_name: task for task in TASKS[name](folder)}
    return tasks


def _stock(names: Sequence[str]) -> dict[str, dict[str, Task]]:
    """Name -> tasks of lm-eval's own collection."""
    if not names:
        return {}
    from lm_eval.tasks import TaskManager

    manager = TaskManager()  # reads some thousand files
    for name in names:
        if name not in manager.task_index:
            raise bad_setting("tasks", name, _allowed(name, manager.all_tasks))
    return {name: _load(manager, name) for name in names}


def _allowed(name: str, stock: Sequence[str]) -> str:
    # Ours first: a slip in a name that we list is more likely than one of the thousands.
    for known in (list(TASKS), list(stock)):
        if close := difflib.get_close_matches(name, known, n=1):
            return f"one of {', '.join(TASKS)}, or a task of lm-eval; the closest is {close[0]}"
    return f"one of {', '.join(TASKS)}, or a task of lm-eval"


def _load(manager: object, name: str) -> dict[str, Task]:
    try:
        loaded: dict[str, dict[str, Task]] = manager.load([name])  # type: ignore[attr-defined]
    # Everything: the data set's own code runs here, and what the Hub and the readers raise is no closed list.
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise bad_setting("tasks", name, f"a task whose data lm-eval can download ({what})") from error
    return loaded["tasks"]
