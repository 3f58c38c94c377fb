"""Tasks of lm-eval from files on this machine: reading the rows, and a task around them without a network."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.errors import SettingError, bad_setting

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

SPLIT = "test"
"""The one split of a task made here."""


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    """The rows of `folder/file`, a `.jsonl` or `.jsonl.gz` file with one JSON object a line.

    Raises:
        SettingError: the file is missing, cannot be read, has no rows, or has a line that is no JSON object.
    """
    found = []
    # Not `splitlines`: it also cuts at characters that JSON allows inside strings, such as U+2028.
    for number, line in enumerate(text(folder, file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise bad_setting("task_data", f"{folder / file}, line {number}", "a JSON object")
        found.append(row)
    if not found:
        raise bad_setting("task_data", str(folder / file), "a file with rows: it is empty")
    return found


def convert(
    found: Sequence[dict[str, Any]], convert_row: Callable[[dict[str, Any]], dict[str, Any]], path: Path
) -> list[dict[str, Any]]:
    """Each row of the file `path` through `convert_row`.

    Raises:
        SettingError: a row lacks a field, or holds something of another kind; says which row.
    """
    converted = []
    for number, row in enumerate(found, start=1):
        try:
            converted.append(convert_row(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise bad_setting("task_data", f"{path}, row {number}", f"a row of this task ({what})") from error
    return converted


def text(folder: Path, file: str) -> str:
    """The text of `folder/file`, unpacked where it ends in `.gz`.

    Raises:
        SettingError: the file is missing, cannot be read, or is not UTF-8.
    """
    path = folder / file
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if file.endswith(".gz") else raw).decode("utf-8").replace("\r\n", "\n")
    except (FileNotFoundError, NotADirectoryError):
        raise bad_setting("task_data", str(folder), f"a folder with {file}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise bad_setting("task_data", str(path), f"a complete gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise bad_setting("task_data", str(path), f"UTF-8 text: byte {error.start} is not") from error
    except OSError as error:
        raise bad_setting("task_data", str(path), f"a file that can be read ({error.strerror})") from error


def make_task(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> ConfigurableTask:
    """A task of lm-eval over rows in memory.

    Args:
        config: what lm-eval's YAML files hold, as a mapping: `task` (its name), `output_type`, `doc_to_text`,
            `doc_to_target`, `metric_list`, ... Templates see a row's fields; functions are given the row. Splits and
            data set are set here. Examples to put before each question go in as
            `num_fewshot` and `fewshot_config={"sampler": "first_n", "samples": [rows]}`.
        rows: at least one; all with the same fields.

    Raises:
        SettingError: there are no rows, or lm-eval is not installed.
    """
    if not rows:
        raise bad_setting("tasks", config["task"], "a task with rows: it has none")
    return _task_class()(config={"num_fewshot": 0, **config, "test_split": SPLIT}, rows=rows)


def require_lm_eval() -> None:
    """Check that lm-eval is there.

    Raises:
        SettingError: it is not installed; says how to mend that.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise SettingError("tasks: needs lm-eval; install it with: pip install 'rheostat[eval]'") from None


@functools.cache
def _task_class() -> Any:
    """The class of our tasks; made late, because lm-eval is optional and slow to import."""
    require_lm_eval()
    import datasets
    from lm_eval.api.task import ConfigurableTask

    class LocalTask(ConfigurableTask):
        """A configured task whose data set is given."""

        def __init__(self, config: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
            self._rows = [dict(row) for row in rows]
            super().__init__(config=config)

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            """In the place of a download: the rows."""
            self.dataset = {SPLIT: datasets.Dataset.from_list(self._rows)}

    return LocalTask
