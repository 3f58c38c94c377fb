"""Show a model's sizes, its method and settings, the table of its dial, and where it comes from.

Of an adapted model only the manifest and the beginnings of the files are read, so this is quick at any size; files that
are missing, cut off or no tensors are an error. --verify reads them whole and compares digests.

Example:
  rheostat info smol-dial
  rheostat info smol-dial --verify
  rheostat info smollm2-135m --json
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.commands import artifact_origin, is_artifact, load
from rheostat.commands.adapt import show_dial
from rheostat.config import Common, setting
from rheostat.errors import SettingError
from rheostat.terminal import console, short

if TYPE_CHECKING:
    from rheostat.geometry import Geometry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat info`."""

    model: str = setting(help="an adapted model, or a dense one", flag=False)
    verify: bool = setting(False, help="read an adapted model's files whole: are they those that were saved?")


def run(config: Config) -> dict[str, Any]:
    """Print what is known of a model.

    Raises:
        SettingError: it cannot be found or read, or is damaged.
    """
    figures = _of_artifact(config) if is_artifact(config.model) else _of_plain(config)
    _show(figures)
    return figures


def _of_artifact(config: Config) -> dict[str, Any]:
    from rheostat.artifact import check_files, glance_at_files, read_manifest
    from rheostat.digests import read_digest
    from rheostat.geometry import Geometry

    folder = Path(config.model).expanduser()
    manifest = read_manifest(folder)
    try:
        geometry = Geometry(**manifest["geometry"])
    except (KeyError, TypeError) as error:
        raise SettingError(f"artifact={config.model!r}: rheostat.json lacks a geometry ({error})") from None
    glance_at_files(folder, manifest["files"])
    if config.verify:
        check_files(folder, manifest["files"], read_digest)  # not what is remembered of them
    figures = {
        "model": config.model,
        "geometry": geometry.to_dict(),
        "parameters": parameters(geometry),
        "method": manifest["method"],
        "dial": manifest["dial"],
        "files": {name: facts["bytes"] for name, facts in manifest["files"].items()},
        "verified": config.verify,
        "report": manifest["report"],
    }
    if config.json:
        figures["provenance"] = artifact_origin(folder, manifest["report"], config.seed)
    return figures


def _of_plain(config: Config) -> dict[str, Any]:
    if config.verify:
        logger.warning("verify: has no effect, %s is no adapted model and has no digests", config.model)
    loaded = load(config.model, config)
    adapted = loaded.adapted
    figures = {
        "model": config.model,
        "geometry": adapted.geometry.to_dict(),
        "parameters": parameters(adapted.geometry),
        "method": adapted.method.to_dict(),
        "dial": adapted.dial.to_dict(),
        "files": {},
        "verified": False,
        "report": {},
    }
    if config.json:
        figures["provenance"] = loaded.origin(config.seed)
    return figures


def parameters(geometry: Geometry) -> dict[str, int]:
    """Weights of the dense model by part; norms and biases, which are few, are left out."""
    parts = {
        "ffn": geometry.num_layers * geometry.ffn_weights,
        "attention": geometry.num_layers * geometry.attention_weights,
        "embedding": geometry.head_weights,
        "head": 0 if geometry.is_tied else geometry.head_weights,
    }
    return parts | {"total": sum(parts.values())}


def _show(figures: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    g, parts = figures["geometry"], figures["parameters"]
    out.print(f"model    {figures['model']}")
    out.print(
        f"sizes    {g['num_layers']} layers, width {g['hidden_size']}, FFN {g['ffn_size']}, "
        f"{g['num_heads']} query and {g['num_kv_heads']} key/value heads of {g['head_dim']}, "
        f"vocabulary {g['vocab_size']:,}{', tied head' if g['is_tied'] else ''}"
    )
    table = Table("weights", box=None, pad_edge=False)
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    for part, number in parts.items():
        table.add_row(part, short(number), f"{number / parts['total']:.0%}")
    out.print(table)
    for name, size in figures["files"].items():
        out.print(f"file     {name}, {short(size)}B")
    if figures["files"]:
        how = "digests of all bytes" if figures["verified"] else "sizes and headers (--verify reads all bytes)"
        out.print(f"checked  {how}")
    settings = {key: value for key, value in figures["method"].items() if key != "name"}
    out.print("\n         ".join([f"method   {figures['method']['name']}", *(f"{k}={v}" for k, v in settings.items())]))
    show_dial(out, figures["dial"])
    _show_origin(figures["report"])


def _show_origin(report: dict[str, Any]) -> None:
    made = report.get("provenance", {})
    for key in ("command", "time", "rheostat", "commit", "seed", "base_digest"):
        if made.get(key) is not None:
            console().print(f"{key.replace('_', ' '):<12} {made[key]}", soft_wrap=True)
