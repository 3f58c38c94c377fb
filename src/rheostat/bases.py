"""Which published model a model in memory is, as far as that can be known without asking anyone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

BUNDLED = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": {
        "name": "SmolLM2-135M-Instruct",
        "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "language": "en",
    }
}
"""GGUF file of a bundled model -> what its publisher says of it."""

STAMP = "conversion.json"
"""In a converted copy, the file that names the GGUF file."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CARD = "README.md"
CARRIED = ("license", "language")
"""What a card says of a model that holds for what is made from it, too."""


def base_facts(model: Any) -> dict[str, Any]:
    """`name`, and `hub_id`, `license` and `language` where they are known; empty for a model made in memory.

    Looks at where `model` was loaded from: a converted copy of a bundled model, a checkpoint folder (whose own card may
    say more), or a Hub id. A folder is named by its last part alone, for the rest is nobody's business.
    """
    place = str(getattr(model.config, "_name_or_path", "") or "")
    if not place:
        return {}
    folder = Path(place).expanduser()
    if os.path.isdir(folder):
        return _of_folder(folder)
    return {"name": place.split("/")[1], "hub_id": place} if HUB_ID.fullmatch(place) else {"name": folder.name}


def _of_folder(folder: Path) -> dict[str, Any]:
    try:
        source = str(json.loads((folder / STAMP).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return {"name": folder.resolve().name} | _of_card(folder / CARD)
    return dict(BUNDLED.get(source, {"name": source.removesuffix(".gguf")}))


def _of_card(card: Path) -> dict[str, Any]:
    """What the metadata of a model card says; nothing if there is no card that can be read."""
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) or {}
    except Exception:  # YAML errors, and what the library makes of odd cards: it is somebody else's file
        return {}
    return {key: metadata[key] for key in CARRIED if metadata.get(key)}
