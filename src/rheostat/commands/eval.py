"""Measure quality against compute: perplexity, accuracy and agreement with the dense model along the dial.

The text is read under the dial too. Beside each setting stand the baselines that its router has to beat at
the same mean compute. Every file of text is measured on its own. All runs see the same windows, so that
errors are paired.

Example:
  rheostat eval smol-dial
  rheostat eval smol-dial --compute 1.0,0.9,0.8,0.7 --data novels.txt,wiki.txt --out figures
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.commands import Loaded, check_computes, check_context, is_artifact, load
from rheostat.config import Common, setting
from rheostat.errors import bad_setting
from rheostat.folders import check_output
from rheostat.terminal import ProgressDisplay, console

if TYPE_CHECKING:
    import torch

    from rheostat.eval.profile import Profile
    from rheostat.eval.quality import Quality

DEFAULT_COMPUTE = (1.0, 0.9, 0.8, 0.7)
HEADINGS = ("asked", "spent", "FFN", "perplexity", "ratio to dense", "accuracy", "agreement", "tokens/s")

NamedProgress = Callable[[str, str, int, int], None]
"""Called with (stage, what the stage says of itself, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat eval`."""

    model: str = setting(help="an adapted model, or a dense one", flag=False)
    compute: tuple[float, ...] = setting(
        (), help="fractions of the dense model's FLOPs (default: 1.0,0.9,0.8,0.7 as far as the dial reaches)"
    )
    data: tuple[str, ...] = setting(("builtin:heldout",), help="text to measure on; each file on its own")
    windows: int = setting(32, help="windows from each text")
    length: int = setting(512, help="tokens in a window")
    baselines: bool = setting(True, help="also measure what a router must beat at the same mean compute")
    passage: int = setting(96, help="tokens of each text that the report quotes with their price (0: no text in it)")
    out: str | None = setting(None, help="folder for the report: report.json, .md, .html, pictures (default: none)")


def run(config: Config) -> dict[str, Any]:
    """Measure, print the table, and write the report if asked.

    Raises:
        SettingError: a setting is out of range, or the text cannot be used.
    """
    if config.passage < 0:
        raise bad_setting("passage", config.passage, "0 or more tokens")
    if config.out is not None:
        _check_folder(Path(config.out))
    from rheostat.bases import base_facts
    from rheostat.report.schema import FORMAT
    from rheostat.text import pack, read_texts

    loaded = load(config.model, config)
    computes = config.compute or tuple(c for c in DEFAULT_COMPUTE if c >= loaded.adapted.dial.low)
    check_computes(loaded.adapted, computes)
    check_context(loaded.adapted, "length", config.length, config.length)
    texts = {
        name: pack(
            loaded.tokenizer,
            read_texts(Path(source)),  # a path even where it has no ending
            length=config.length,
            limit=config.windows,
            seed=config.seed,
            name="data",
        )
        for name, source in names(config.data).items()
    }
    dials = [c for c in dict.fromkeys(computes) if c != 1.0]
    base = loaded.adapted.report.get("base") if loaded.is_artifact else base_facts(loaded.adapted.model)
    figures: dict[str, Any] = {
        "format": FORMAT,
        "model": config.model,
        "method": loaded.adapted.method.to_dict(),
        "base": base or {},
        "geometry": loaded.adapted.geometry.to_dict(),
        "seed": config.seed,
        "texts": [],
    }
    with ProgressDisplay() as progress:
        for name, windows in texts.items():
            facts = {"name": name, "windows": len(windows), "length": config.length, "digest": _digest(windows)}
            facts |= _measure(config, loaded, windows, dials, partial(_named, progress, name))
            figures["texts"].append(facts)
    if config.json or config.out is not None:
        figures["provenance"] = loaded.origin(config.seed)
    _show(figures)
    if config.out is not None:
        _write(config, figures)
    return figures


def _digest(windows: torch.Tensor) -> str:
    """Tells whether two reports are about the same tokens."""
    return hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def names(sources: Sequence[str]) -> dict[str, str]:
    """Name -> source: a file's stem, or all of it where two files share a stem."""
    stems = {source: os.path.basename(source.rstrip("/")).split(".")[0] or source for source in sources}
    count = Counter(stems.values())
    return {(stem if count[stem] == 1 else source): source for source, stem in stems.items()}


def _measure(
    config: Config, loaded: Loaded, windows: torch.Tensor, dials: Sequence[float], progress: NamedProgress
) -> dict[str, Any]:
    """`runs` of one text (dense, then each dial followed by its baselines), and where the dials spent."""
    from rheostat.eval.profile import passage
    from rheostat.eval.quality import Run, evaluate

    adapted = loaded.adapted
    meters: dict[str, Profile] = {}
    runs = [Run(label=f"dial {compute:g}", compute=compute) for compute in dials]
    found = evaluate(adapted, windows, runs, meters=meters, progress=partial(progress, "dials"))
    rows = [_row(found[0], "dense")]
    rivals: dict[str, tuple[str, float, Run]] = {}
    for compute, run_ in zip(dials, runs, strict=True):
        if not config.baselines:
            continue
        overrides = adapted.method.baselines(adapted.model, meters[run_.label].expert_counts, config.seed)
        for kind, override in overrides.items():
            label = f"{kind} {compute:g}"
            rivals[label] = (kind, compute, Run(label=label, compute=compute, override=override))
    scored: dict[str, Quality] = {}
    if rivals:
        chosen = [run_ for _, _, run_ in rivals.values()]
        again = evaluate(adapted, windows, chosen, progress=partial(progress, "baselines"))
        scored = {one.label: one for one in again}
    for compute, quality in zip(dials, found[1:], strict=True):
        rows.append(_row(quality, "dial"))
        rows += [_row(scored[label], kind) for label, (kind, at, _) in rivals.items() if at == compute]
    figures: dict[str, Any] = {"runs": rows}
    uses = [(run_.compute, meters[run_.label].use()) for run_ in runs]
    if found_uses := [{"asked": compute} | use for compute, use in uses if use is not None]:
        figures["use"] = found_uses
    if config.passage and dials:
        figures["passage"] = passage(adapted, loaded.tokenizer, windows[0], dials, config.passage)
    return figures


def _named(progress: ProgressDisplay, text: str, stage: str, _: str, done: int, total: int) -> None:
    progress(f"{text}: {stage}", done, total)


def _row(quality: Quality, kind: str) -> dict[str, Any]:
    derived = {
        "kind": kind,
        "ratio_error": quality.ratio * quality.loss_error,
        "tokens_per_second": quality.num_tokens / quality.seconds,
    }
    return quality.to_dict() | derived


def _check_folder(out: Path) -> None:
    check_output(out, overwrite=True)
    if out.is_dir() and not os.access(out, os.W_OK):
        raise bad_setting("out", str(out), "a folder that can be written")


def _write(config: Config, figures: dict[str, Any]) -> None:
    from rheostat.report.writing import carried, write

    out = Path(config.out or "")
    files = write(out, figures | carried(out, figures))
    console().print("\nwritten: " + ", ".join(map(str, files)), soft_wrap=True)
    if (line := _refresh_card(Path(config.model), out)) is not None:
        console().print(line, soft_wrap=True)


def _refresh_card(model: Path, out: Path) -> str | None:
    """Bring the artifact's model card up to date where the report lies in the artifact. Returns what to say of it."""
    from rheostat.report.card import refresh

    folder = model.expanduser()
    if not is_artifact(str(model)) or out.resolve().parent != folder.resolve():
        return None
    return refresh(folder, out.resolve().name)


def _show(figures: dict[str, Any]) -> None:
    from rich.table import Table

    for text in figures["texts"]:
        tokens = text["runs"][0]["num_tokens"]
        size = f"{text['windows']} windows of {text['length']}, {tokens:,} predicted tokens"
        table = Table(
            title=f"{text['name']}: {size}",
            title_justify="left",
            title_style="",
            box=None,
            pad_edge=False,
        )
        table.add_column("run")
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for row in text["runs"]:
            table.add_row(*_cells(row))
        console().print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    is_rival = row["kind"] not in ("dense", "dial")
    ratio = "1" if row["kind"] == "dense" else f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}"
    return [
        ("  " if is_rival else "") + row["kind"],
        f"{row['asked']:g}",
        f"{row['compute']:.3f}",
        f"{row['ffn_fraction']:.0%}",
        f"{row['perplexity']:.2f}",
        ratio,
        f"{row['accuracy']:.1%}",
        f"{row['agreement']:.1%}",
        f"{row['tokens_per_second']:,.0f}",
    ]
