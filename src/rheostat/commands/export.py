"""Freeze one setting of the dial into a plain checkpoint that any engine loads without this library.

A plain checkpoint cannot decide token by token, so it gets one width for all tokens, the widest that costs at
most this much. Expect less quality than the dial gives at the same mean.

Example:
  rheostat export smol-dial --compute 0.71 --out smol-71
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rheostat.commands import load
from rheostat.config import Common, setting
from rheostat.folders import check_output
from rheostat.terminal import console, short


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat export`."""

    model: str = setting(help="an adapted model", flag=False)
    compute: float = setting(1.0, help="fraction of the dense model's FLOPs that no token may exceed")
    out: str = setting(help="the folder to make")
    overwrite: bool = setting(False, help="replace the output folder if it exists")


def run(config: Config) -> dict[str, Any]:
    """Write the plain checkpoint.

    Raises:
        SettingError: a plain checkpoint cannot express this setting, or the folder cannot be written.
    """
    out = check_output(config.out, overwrite=config.overwrite)
    from rheostat.exporting import export
    from rheostat.geometry import Geometry

    loaded = load(config.model, config)
    num_dense = sum(p.numel() for p in loaded.adapted.model.parameters())
    needed = num_dense * loaded.adapted.dtype.itemsize
    check_output(out, overwrite=config.overwrite, needed_bytes=needed)
    origin = loaded.origin(config.seed) if config.json else None
    dense = loaded.adapted.geometry
    export(loaded.adapted, loaded.tokenizer, out, config.compute, overwrite=config.overwrite)
    width = json.loads((out / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
    frozen = Geometry(**dense.to_dict() | {"ffn_size": width})
    figures = {
        "path": str(out),
        "asked": config.compute,
        "compute": frozen.token_flops / dense.token_flops,
        "ffn_size": width,
        "dense_ffn_size": dense.ffn_size,
        "num_parameters": num_parameters(out),
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
    }
    _show(figures)
    return figures if origin is None else figures | {"provenance": origin}


def num_parameters(folder: Path) -> int:
    """Numbers in a checkpoint's safetensors files, from their headers."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def _show(figures: dict[str, Any]) -> None:
    out = console()
    out.print(f"saved       {figures['path']}, {short(figures['bytes'])}B")
    out.print(f"compute     {figures['compute']:.3f} of dense, {figures['asked']:g} asked")
    out.print(f"width       {figures['ffn_size']} of {figures['dense_ffn_size']} FFN channels, for every token")
    out.print(f"parameters  {short(figures['num_parameters'])}")
