"""Loading an artifact without `transformers`, for those who only write an answer with our own runtime.

Importing `transformers`' models takes several times as long as reading a prompt. What an answer needs of them is
parameters, a few integers and the tokenizer's file, so that is all that is read here: weights are mapped, not
copied, and methods attach to a `Skeleton`. Whatever is not known to come out the same raises `Unknown`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rheostat.adapted import Adapted
from rheostat.artifact import TENSORS, check_files, read_manifest
from rheostat.dial import Dial
from rheostat.methods import kept_method
from rheostat.skeleton import Config, Skeleton, Unknown
from rheostat.wording import Wording

WEIGHTS = "model.safetensors"


def load_lean(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Adapted, Wording]:
    """The model of an artifact for our own runtime, and its tokenizer: computes what `rheostat.load` gives computes
    there, to the bit, and nothing else.

    Raises:
        Unknown: this artifact needs `transformers`; the message says why.
        SettingError: a newer format, a missing or damaged file, or a file other than the one that was saved.
    """
    manifest = read_manifest(folder)
    method = kept_method(manifest["method"])
    if method.needs_host:
        raise Unknown(f"the method {method.name}")
    words = Wording(folder)
    if WEIGHTS not in manifest["files"]:
        raise Unknown("weights in several files")
    check_files(folder, manifest["files"])
    config = Config(**_json(folder / "config.json"))
    defaults = Config(**_json(folder / "generation_config.json"))
    if not hasattr(defaults, "eos_token_id"):
        raise Unknown("a generation_config.json without an end token")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    host: Any = Skeleton(config, tensors, defaults)
    adapted = Adapted(host, method, Dial.from_dict(manifest["dial"]), report=manifest["report"])
    method.load_state(host, load_file(folder / TENSORS))
    return adapted, words


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unknown(f"{file.name}, which cannot be read ({error})") from None
    return found
