"""`export`: freeze the dial into a plain checkpoint that any engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rheostat.adapted import Adapted
from rheostat.artifact import write_plain
from rheostat.folders import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export(
    adapted: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    compute: float = 1.0,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a plain checkpoint that costs at most `compute` of the dense model at every token.

    Raises:
        SettingError: a plain checkpoint cannot express this setting (the message says why and what it could), or the
            folder cannot be written.
    """
    config, state = adapted.method.freeze(adapted.model, compute)
    with whole_folder(path, overwrite=overwrite) as folder:
        write_plain(folder, config, state, adapted.generation_config, tokenizer)
    return Path(path)
