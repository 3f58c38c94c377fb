"""Measure quality against compute: perplexity, accuracy and agreement with the dense model along the dial.

The text is read under the dial too. Beside each setting stand the baselines that its router has to beat at
the same mean compute. Every file of text is measured on its own. All runs see the same windows, so that
errors are paired.

With --tasks, benchmark tasks are scored under the dial, each run paired with the dense model on the same
rows; text is then measured only where --data names some.

Example:
  rheostat eval smol-dial
  rheostat eval smol-dial --compute 1.0,0.9,0.8,0.7 --data novels.txt,wiki.txt --out figures
  rheostat eval smol-dial --tasks hellaswag,arc_easy --task-data data --limit 200
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.commands import Loaded, check_computes, check_context, is_artifact, load
from rheostat.config import Common, setting
from rheostat.errors import bad_setting
from rheostat.eval.tables import task_notes, task_table, text_table
from rheostat.folders import check_output
from rheostat.processes import Ranks, join
from rheostat.terminal import ProgressDisplay, console

if TYPE_CHECKING:
    import torch

    from rheostat.eval.profile import Profile
    from rheostat.eval.quality import Quality

DEFAULT_COMPUTE = (1.0, 0.9, 0.8, 0.7)
DEFAULT_TEXT = "builtin:heldout"

NamedProgress = Callable[[str, str, int, int], None]
"""Called with (stage, what the stage says of itself, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat eval`."""

    model: str = setting(help="an adapted model, or a dense one", flag=False)
    compute: tuple[float, ...] = setting(
        (), help="fractions of the dense model's FLOPs (default: 1.0,0.9,0.8,0.7 as far as the dial reaches)"
    )
    data: tuple[str, ...] = setting(
        (), help="text to measure on; each file on its own (default: builtin:heldout, and none with --tasks)"
    )
    windows: int = setting(32, help="windows from each text")
    length: int = setting(512, help="tokens in a window")
    baselines: bool = setting(True, help="also measure what a router must beat at the same mean compute")
    tasks: tuple[str, ...] = setting((), help="benchmark tasks: ours over --task-data, or any of lm-eval's own")
    task_data: str | None = setting(None, help="the data folder whose files our tasks read")
    limit: int | None = setting(None, help="the first rows of each task only (default: all)")
    batch_tokens: int = setting(2048, help="tokens that a task's prompts may have together in one batch")
    chat_template: bool = setting(False, help="ask in the model's chat template")
    task_baselines: bool = setting(False, help="score the baselines on tasks too (about three times the work)")
    run_code: bool = setting(False, help="allow tasks that run programs which the model writes")
    hold: bool = setting(False, help="steer each window by what it has spent (causally), to end at what was asked")
    hold_tasks: bool = setting(True, help="steer each request of a task by what it has spent, likewise")
    passage: int = setting(96, help="tokens of each text that the report quotes with their price (0: no text in it)")
    out: str | None = setting(None, help="folder for the report: report.json, .md, .html, pictures (default: none)")


def run(config: Config) -> dict[str, Any]:
    """Measure, print the tables, and write the report if asked.

    Under `accelerate launch`, tasks are shared among the processes; the first one does and says all the rest.

    Raises:
        SettingError: a setting is out of range, or the text or a task cannot be used.
    """
    if config.passage < 0:
        raise bad_setting("passage", config.passage, "0 or more tokens")
    if config.out is not None:
        check_output(config.out, overwrite=True, is_replaced=False)
    _check_tasks(config)
    ranks = Ranks()
    if config.tasks:
        ranks = join()
        config = replace(config, device=ranks.device(config.device))
    try:
        figures = _figures(config, ranks)
    finally:
        ranks.close()
    if ranks.index:
        raise SystemExit(0)  # the first process speaks for all
    _show(figures)
    if config.out is not None:
        _write(config, figures)
    return figures


def _figures(config: Config, ranks: Ranks) -> dict[str, Any]:
    from rheostat.bases import base_facts
    from rheostat.report.schema import FORMAT
    from rheostat.text import pack, read_texts

    loaded = load(config.model, config)
    computes = config.compute or tuple(c for c in DEFAULT_COMPUTE if c >= loaded.adapted.dial.low)
    check_computes(loaded.adapted, computes)
    sources = config.data or (() if config.tasks else (DEFAULT_TEXT,))
    if sources:
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
        for name, source in names(sources).items()
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
        "tasks": [],
    }
    with ProgressDisplay() as progress:
        if config.tasks:  # first, because a task that cannot be read is told before long work
            figures["tasks"] = _measure_tasks(config, loaded, dials, ranks, progress)
        for name, windows in texts.items() if ranks.index == 0 else ():
            facts = {"name": name, "windows": len(windows), "length": config.length, "digest": _digest(windows)}
            facts |= _measure(config, loaded, windows, dials, partial(_named, progress, name))
            figures["texts"].append(facts)
    if config.json or config.out is not None:
        figures["provenance"] = loaded.origin(config.seed)
    return figures


def _check_tasks(config: Config) -> None:
    """Settings of tasks, checked before the model is loaded."""
    if config.limit is not None and config.limit < 1:
        raise bad_setting("limit", config.limit, "at least 1 row")
    if config.batch_tokens < 1:
        raise bad_setting("batch_tokens", config.batch_tokens, "1 or more")
    if config.tasks:
        return
    for one in ("task_data", "limit", "chat_template", "task_baselines"):
        if (value := getattr(config, one)) not in (None, False):
            raise bad_setting(one, value, "left out where no --tasks are asked for")


def _measure_tasks(
    config: Config, loaded: Loaded, dials: Sequence[float], ranks: Ranks, progress: ProgressDisplay
) -> list[dict[str, Any]]:
    """One row for each task, setting and metric: the dense model's first, then the dials'."""
    from rheostat.eval.benchmarks import evaluate_tasks

    runs = evaluate_tasks(
        loaded.adapted,
        loaded.tokenizer,
        config.tasks,
        dials,
        folder=None if config.task_data is None else Path(config.task_data).expanduser(),
        limit=config.limit,
        seed=config.seed,
        batch_tokens=config.batch_tokens,
        run_code=config.run_code,
        baselines=config.task_baselines,
        chat_template=config.chat_template,
        hold=config.hold_tasks,
        ranks=ranks,
        progress=_silent if ranks.index else progress,
    )
    return [row for one in runs for row in one.to_rows()]


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
    runs = [Run(label=f"dial {compute:g}", compute=compute, hold=config.hold) for compute in dials]
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


def _silent(what: str, done: int, total: int) -> None:
    """The progress of a process that is not the first."""


def _named(progress: ProgressDisplay, text: str, stage: str, _: str, done: int, total: int) -> None:
    progress(f"{text}: {stage}", done, total)


def _row(quality: Quality, kind: str) -> dict[str, Any]:
    derived = {
        "kind": kind,
        "ratio_error": quality.ratio * quality.loss_error,
        "tokens_per_second": quality.num_tokens / quality.seconds,
    }
    return quality.to_dict() | derived


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
    for text in figures["texts"]:
        console().print(text_table(text))
    for name in dict.fromkeys(row["task"] for row in figures["tasks"]):
        rows = [row for row in figures["tasks"] if row["task"] == name]
        console().print(task_table(rows))
        for note in task_notes(rows):
            console().print(note, soft_wrap=True)
