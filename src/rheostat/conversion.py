"""A GGUF file as a checkpoint: converted once, and the copy kept in a cache.

`transformers` takes many seconds to read such a file and cannot save it again as it is. A copy enters the cache in one
rename: it is complete, or it is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rheostat.checkpoints import SOURCES, check_weights, ensure_pad_token, one_line, reading
from rheostat.errors import bad_setting
from rheostat.folders import NOTICE, cache_folder

logger = logging.getLogger(__name__)

STAMP = "conversion.json"
"""The file in a converted copy that says where it came from and how large each of its files is."""

CONVERSION = 1
"""Raise it when conversion changes what it writes: older copies are then made again."""

DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""Values of GGUF's `tokenizer.ggml.pre` for vocabularies learned on text cut at every digit."""


def convert_gguf(path: Path) -> Path:
    """The folder with the float32 checkpoint of a GGUF file; converts it unless the cache has an intact copy.

    Raises:
        SettingError: the file is not a complete GGUF file of a causal LM, or the cache cannot be written.
    """
    with reading(str(path), "a file that can be read"), path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise bad_setting("model", str(path), f"{SOURCES}: this file does not begin with the magic GGUF")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # By content: a file that moved is found again, and one that was replaced is not mistaken for the old one.
    folder = cache_folder() / f"{path.stem}-{digest[:16]}"
    if not _is_intact(folder, digest):
        _add_to_cache(path, digest, folder)
    return folder


def _is_intact(folder: Path, digest: str) -> bool:
    """Whether a converted copy is there, of this GGUF file, with every file as long as it was written."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        sizes = {file: (folder / file).stat().st_size for file in stamp["files"]}
        return (stamp["conversion"], stamp["sha256"], stamp["files"]) == (CONVERSION, digest, sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _add_to_cache(path: Path, digest: str, folder: Path) -> None:
    logger.log(NOTICE, "converting %s, once; the copy goes to %s", path.name, folder)
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
        allowed = f"a folder that can be written, with room for the converted model ({one_line(error)})"
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
    with reading(source, "a complete GGUF file, not a truncated or damaged one"):
        pre = GGUFReader(path).fields.get("tokenizer.ggml.pre")
        splits_digits = pre is not None and pre.contents() in DIGIT_SPLITTERS
    # Some progress bars of `transformers` do not ask whether bars are wanted; they write to standard error.
    with contextlib.redirect_stderr(io.StringIO()):
        with reading(source, "a GGUF file of a causal LM that transformers knows"):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
        check_weights(source, info)
        ensure_pad_token(source, tokenizer)
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
