"""The commands, one module for each verb, and what several of them need. Heavy imports wait for `run`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.config import Common
from rheostat.errors import SettingError, bad_setting, renamed
from rheostat.report import file_digest, origin

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rheostat.adapted import Adapted
    from rheostat.wording import Wording


@dataclass(frozen=True)
class Loaded:
    """A model that a command was given, dense or adapted."""

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase | Wording
    source: str
    is_artifact: bool

    def origin(self, seed: int) -> dict[str, Any]:
        """Provenance of figures about this model. Reads all weights of a plain one, for their digest."""
        if self.is_artifact:
            return artifact_origin(Path(self.source), self.adapted.report, seed)
        from rheostat.models import model_digest

        return origin(seed=seed, model=self.source, model_digest=model_digest(self.adapted.model))


def artifact_origin(folder: Path, made: dict[str, Any], seed: int) -> dict[str, Any]:
    """Provenance of figures about an artifact. The manifest holds all digests, so its own stands for all."""
    manifest = folder.expanduser() / "rheostat.json"
    base = made.get("provenance", {}).get("base_digest")
    return origin(seed=seed, model=str(folder), artifact_digest=file_digest(manifest), base_digest=base)


def is_artifact(source: str) -> bool:
    """Whether `source` is a folder that `adapt` wrote. A bundled name wins over a folder, as in `load`."""
    from rheostat.checkpoints import BUNDLED

    return source not in BUNDLED and os.path.isfile(os.path.join(os.path.expanduser(source), "rheostat.json"))


def load(source: str, config: Common) -> Loaded:
    """Load MODEL; a dense model is wrapped, so that commands see one kind only.

    Raises:
        SettingError: it cannot be found or read.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from rheostat import models
    from rheostat.adapted import Adapted

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    found, tokenizer = models.load(source, dtype=config.dtype, device=config.device)
    adapted: Any = found
    if isinstance(adapted, Adapted):
        return Loaded(adapted, tokenizer, source, True)
    return Loaded(Adapted(found), tokenizer, source, False)


def load_lean(source: str, config: Common) -> Loaded | None:
    """An artifact for our own runtime alone, without importing `transformers`; None where that cannot be, or where
    nothing would come of it.

    Raises:
        SettingError: it is damaged, or a setting is not allowed.
    """
    if not is_artifact(source) or config.device != "cpu":
        return None
    import torch

    from rheostat.checkpoints import check_dtype
    from rheostat.lean import load_lean as load_artifact
    from rheostat.skeleton import Unknown

    torch.manual_seed(config.seed)
    try:
        return Loaded(*load_artifact(Path(source).expanduser(), dtype=check_dtype(config.dtype)), source, True)
    except Unknown as reason:
        logger.debug("transformers loads %s: not known without it is %s", source, reason)
        return None


def check_computes(adapted: Adapted, computes: Sequence[float], name: str = "compute") -> None:
    """Refuse, before any work is done, a value of the setting `name` that the dial does not reach.

    Raises:
        SettingError: it is outside the range, which the message gives.
    """
    with renamed(compute=name):
        for compute in computes:
            adapted.dial.native(compute)


def check_context(adapted: Adapted, name: str, value: int, num_tokens: int) -> None:
    """Refuse the setting `name=value`, which makes `num_tokens` tokens in all, if the model cannot read them.

    Raises:
        SettingError: it is too large.
    """
    limit = getattr(adapted.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and num_tokens > limit:
        most = value - (num_tokens - limit)
        if most < 1:  # whatever the setting were
            raise SettingError(f"prompt of {num_tokens - value} tokens: must be at most {limit - 1}")
        raise bad_setting(name, value, f"at most {most}: this model reads {limit} tokens")
