"""Measure quality against compute: perplexity, accuracy and agreement with the dense model along the dial.

The text is read under the dial too. Beside each setting stand the baselines that its router has to beat at
the same mean compute. Every file of text is measured on its own. All runs see the same windows, so that
errors are paired.

Example:
  rheostat eval smol-dial
  rheostat eval smol-dial --compute 1.0,0.9,0.8,0.7 --data novels.txt,wiki.txt --out figures
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.commands import check_computes, check_context, load
from rheostat.config import Common, setting
from rheostat.errors import bad_setting
from rheostat.folders import check_output
from rheostat.report import to_json, write_whole
from rheostat.terminal import ProgressDisplay, console

if TYPE_CHECKING:
    import torch

    from rheostat.adapted import Adapted
    from rheostat.eval.quality import Quality
    from rheostat.meter import Meter

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
    out: str | None = setting(None, help="folder for report.json and pareto.png (default: none are written)")


def run(config: Config) -> dict[str, Any]:
    """Measure, print the table, and write the report if asked.

    Raises:
        SettingError: a setting is out of range, or the text cannot be used.
    """
    if config.out is not None:
        _check_folder(Path(config.out))
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
    figures: dict[str, Any] = {
        "model": config.model,
        "method": loaded.adapted.method.to_dict(),
        "seed": config.seed,
        "texts": [],
    }
    with ProgressDisplay() as progress:
        for name, windows in texts.items():
            rows = _measure(config, loaded.adapted, windows, dials, partial(_named, progress, name))
            facts = {"name": name, "windows": len(windows), "length": config.length}
            figures["texts"].append(facts | {"runs": rows})
    if config.json or config.out is not None:
        figures["provenance"] = loaded.origin(config.seed)
    _show(figures)
    if config.out is not None:
        _write(Path(config.out), figures)
    return figures


def names(sources: Sequence[str]) -> dict[str, str]:
    """Name -> source: a file's stem, or all of it where two files share a stem."""
    stems = {source: os.path.basename(source.rstrip("/")).split(".")[0] or source for source in sources}
    count = Counter(stems.values())
    return {(stem if count[stem] == 1 else source): source for source, stem in stems.items()}


def _measure(
    config: Config, adapted: Adapted, windows: torch.Tensor, dials: Sequence[float], progress: NamedProgress
) -> list[dict[str, Any]]:
    """Rows of one text: dense, then each dial followed by its baselines."""
    from rheostat.eval.quality import Run, evaluate

    meters: dict[str, Meter] = {}
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
    return rows


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
    check_output(out, overwrite=True, is_replaced=False)
    if out.is_dir() and not os.access(out, os.W_OK):
        raise bad_setting("out", str(out), "a folder that can be written")


def _write(out: Path, figures: dict[str, Any]) -> None:
    from rheostat.eval.plots import pareto

    write_whole(out / "report.json", (to_json(figures, indent=2) + "\n").encode())
    pareto(figures, out / "pareto.png")
    console().print(f"\nwritten: {out / 'report.json'}, {out / 'pareto.png'}", soft_wrap=True)


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
