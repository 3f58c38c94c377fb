"""One solved layer on disk, so that an interrupted fit goes on with the next one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rheostat.methods.dynamoe.ffn import NestedFFN

logger = logging.getLogger(__name__)


def keep(file: Path, ffn: NestedFFN, facts: dict[str, Any], generator: torch.Generator) -> None:
    """Write what was solved for one layer, and the state of the generator after it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"order": ffn.order, "mean_damage": ffn.mean_damage, "generator": generator.get_state()}
    for part in ("router", "downs"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(ffn, part).state_dict().items()}
    temporary = file.with_suffix(".tmp")
    try:
        save_file({k: v.clone() for k, v in tensors.items()}, temporary, metadata={"facts": json.dumps(facts)})
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def restore(file: Path, ffn: NestedFFN, generator: torch.Generator, *, has_bias: bool) -> dict[str, Any] | None:
    """Put a kept layer back into a fresh module. Returns its figures, or None where nothing usable is kept."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged leftover is no reason to fail: solve again
        logger.warning("work_dir: %s cannot be read (%s); solving the layer again", file, error)
        return None
    order = tensors["order"].to(ffn.order.device)
    ffn.mlp.reorder(order)
    ffn.order.copy_(order)
    ffn.mean_damage.copy_(tensors["mean_damage"])
    if any(name.startswith("downs.") for name in tensors):
        ffn.add_downs(has_bias=has_bias)
    for part in ("router", "downs"):
        inside = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        getattr(ffn, part).load_state_dict(inside)
    generator.set_state(tensors["generator"])
    return facts
