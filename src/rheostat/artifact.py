"""Artifacts: a folder that holds an adapted model.

    model.safetensors, config.json, tokenizer files   the host, channels in the learned order: stock
    `transformers` loads
                                                      it as the dense model
    method.safetensors                                what the method learned
    rheostat.json                                     format version, method, dial, report, digests of the files
    README.md                                         the model card; may be edited

A folder appears under its name only when it is complete, and each file's digest is checked on loading.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import rheostat
from rheostat import families
from rheostat.adapted import Adapted
from rheostat.checkpoints import reading
from rheostat.dial import Dial
from rheostat.digests import known_digest
from rheostat.errors import SettingError, bad_setting
from rheostat.folders import whole_folder
from rheostat.methods import kept_method
from rheostat.report import card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "rheostat.json"
TENSORS = "method.safetensors"
CONFIG = "config.json"


def save(adapted: Adapted, tokenizer: PreTrainedTokenizerBase, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write an artifact.

    Args:
        adapted: the model.
        tokenizer: saved beside it.
        path: the folder to make.
        overwrite: replace the folder if it exists.

    Raises:
        SettingError: the folder exists, cannot be written, or the disk is full. Nothing is left behind.
    """
    with whole_folder(path, overwrite=overwrite) as folder:
        write_plain(
            folder, adapted.config, families.plain_state_dict(adapted.model), adapted.generation_config, tokenizer
        )
        tensors = {name: t.detach().cpu().contiguous() for name, t in adapted.method.state(adapted.model).items()}
        save_file(tensors, folder / TENSORS)
        manifest = {
            "format_version": FORMAT_VERSION,
            "rheostat_version": rheostat.__version__,
            "method": adapted.method.to_dict(),
            "dial": adapted.dial.to_dict(),
            "geometry": adapted.geometry.to_dict(),
            "report": adapted.report,
            "files": {p.name: _facts(p) for p in sorted(folder.glob("*.safetensors"))},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        (folder / card.NAME).write_text(card.artifact_card(manifest, name=Path(path).name), encoding="utf-8")
    return Path(path)


def write_plain(
    folder: Path,
    config: Any,
    state: dict[str, torch.Tensor],
    generation_config: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a checkpoint that stock `transformers` loads: configuration, weights in shards, tokenizer."""
    from huggingface_hub import save_torch_state_dict
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    save_torch_state_dict(state, folder, max_shard_size="5GB")
    config = copy.deepcopy(config)
    config.dtype = next(iter(state.values())).dtype
    if not config.architectures:  # other engines look here; a model made from a configuration does not say
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_artifact(
    path: str | Path, *, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Adapted, PreTrainedTokenizerBase]:
    """Read an artifact back. Use `rheostat.load`, which takes every kind of source.

    Raises:
        SettingError: a newer format, a missing or damaged file, or a file other than the one that was saved.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest["files"])
    options: dict[str, Any] = {"trust_remote_code": False}  # None would ask on the terminal
    with reading(str(path), "an artifact with all its files"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    adapted = Adapted(
        model, kept_method(manifest["method"]), Dial.from_dict(manifest["dial"]), report=manifest["report"]
    )
    adapted.method.load_state(model, load_file(folder / TENSORS))
    return adapted, tokenizer


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked for its version and its keys.

    Raises:
        SettingError: it cannot be read, or was written by a newer format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingError(f"artifact={str(folder)!r}: {MANIFEST} cannot be read ({error})") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise SettingError(f"artifact={str(folder)!r}: {MANIFEST} has no format_version")
    if version > FORMAT_VERSION:
        raise bad_setting(
            "artifact.format_version", version, f"at most {FORMAT_VERSION}: upgrade rheostat to load {folder}"
        )
    if missing := {"method", "dial", "report", "files"} - set(manifest):
        raise SettingError(f"artifact={str(folder)!r}: {MANIFEST} lacks {', '.join(sorted(missing))}")
    return manifest


def check_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], digest_of: Callable[[Path], str] = known_digest
) -> None:
    """Whether the files that a manifest names are those that were saved.

    Args:
        digest_of: SHA-256 of a file; `read_digest` sees what a failing disk changed behind the file system's back.

    Raises:
        SettingError: one is missing, or is another.
    """
    for name, wanted in files.items():
        _check_size(folder, name, wanted)
        found = digest_of(folder / name)
        if found != wanted["sha256"]:
            what = "its base digest differs" if name.startswith("model") else "its digest differs"
            raise SettingError(
                f"artifact={str(folder)!r}: {name} is not the file that was saved ({what}: "
                f"{found[:12]}, must be {wanted['sha256'][:12]})"
            )


def glance_at_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """What can be seen of files without reading them whole: that they are there, as long as those that were saved, and
    that their beginnings name tensors that fill them. Changed numbers are seen by `check_files` alone.

    Raises:
        SettingError: one is missing or damaged.
    """
    if not (folder / CONFIG).is_file():
        raise SettingError(f"artifact={str(folder)!r}: the file {CONFIG} is missing")
    for name, wanted in files.items():
        _check_size(folder, name, wanted)
        try:
            with safe_open(folder / name, "pt") as opened:
                opened.keys()
        except (OSError, SafetensorError) as error:
            raise SettingError(f"artifact={str(folder)!r}: {name} is damaged ({error})") from None


def _check_size(folder: Path, name: str, wanted: Mapping[str, Any]) -> None:
    file = folder / name
    if not file.is_file():
        raise SettingError(f"artifact={str(folder)!r}: the file {name} is missing")
    if not os.access(file, os.R_OK):
        raise SettingError(f"artifact={str(folder)!r}: the file {name} cannot be read by this user")
    if (found := file.stat().st_size) != wanted["bytes"]:
        raise SettingError(
            f"artifact={str(folder)!r}: {name} has {found} bytes, must have {wanted['bytes']}: it is damaged"
        )


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": known_digest(file)}
