"""Benchmark tasks that read the files of a data folder, by name.

A builder takes the data folder and returns tasks of lm-eval; most return one. Each file here holds one kind of task.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rheostat.eval.tasks.choice import CHOICE_TASKS
from rheostat.eval.tasks.language import LANGUAGE_TASKS
from rheostat.eval.tasks.long import LONG_TASKS
from rheostat.eval.tasks.programs import PROGRAM_TASKS
from rheostat.eval.tasks.reading import READING_TASKS
from rheostat.eval.tasks.sums import SUM_TASKS

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Builder = Callable[[Path], "list[Task]"]
"""From the data folder to tasks; raises a `SettingError` where a file is missing."""

TASKS: dict[str, Builder] = CHOICE_TASKS | LANGUAGE_TASKS | READING_TASKS | SUM_TASKS | PROGRAM_TASKS | LONG_TASKS
"""Name -> builder, in the order in which they are listed to the user."""
