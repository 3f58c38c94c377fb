"""`export`: freeze the dial into a plain checkpoint that any engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.adapted import Adapted
from rheostat.artifact import write_plain
from rheostat.folders import whole_folder
from rheostat.geometry import Geometry
from rheostat.report import card

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
        (folder / card.NAME).write_text(_card(adapted, config, compute, Path(path).name), encoding="utf-8")
    return Path(path)


def _card(adapted: Adapted, config: Any, compute: float, name: str) -> str:
    dense, frozen = adapted.geometry, Geometry.from_config(config)
    facts = {
        "base": adapted.report.get("base") or {},
        "method": adapted.method.name,
        "asked": compute,
        "compute": frozen.token_flops / dense.token_flops,
        "ffn_size": frozen.ffn_size,
        "dense_ffn_size": dense.ffn_size,
        "provenance": adapted.report.get("provenance"),
    }
    return card.export_card(facts, name=name)
