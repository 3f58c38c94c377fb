"""Turn a dense model into one whose compute is a dial: fit, train if asked, measure the dial, save.

An interrupted run resumes when the same command is run again; what it has done so far lies beside the output
folder, in `.NAME.partial`.

Example:
  rheostat adapt smollm2-135m --method dynamoe --data my_text.txt --held-out other_text.txt \\
      --set num_experts=4 --fit windows=64 --train tokens=2000000 --out smol-dial

  The same from a file, with another seed:

  rheostat adapt --config adapt.yaml --seed 1

      # adapt.yaml
      model: smollm2-135m
      out: smol-dial
      data: [my_text.txt, more_text/]
      settings: {num_experts: 4}
      train: {tokens: 2000000, learning_rate: 1e-4}
"""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat import processes
from rheostat.commands import artifact_origin, load
from rheostat.config import Common, from_mapping, setting
from rheostat.errors import bad_setting
from rheostat.folders import check_output
from rheostat.terminal import ProgressDisplay, console, duration, sparkline

if TYPE_CHECKING:
    from rich.console import Console

    from rheostat.adapted import Adapted

BYTES_PER_PARAMETER = 12
"""Room on the disk: six for the artifact (float32 and what a method adds), as many for the kept fit."""


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat adapt`."""

    model: str = setting(help="the dense model: a bundled name, Hub id, folder or .gguf file", flag=False)
    out: str = setting(help="the folder to make")
    method: str = setting("", help="what to adapt it with (default: the first that has a dial)")
    settings: Mapping[str, Any] = setting({}, help="a setting of the method; may be repeated", flag="--set")
    data: tuple[str, ...] = setting(("builtin:calibration",), help="text to fit on: files and folders")
    held_out: tuple[str, ...] = setting(("builtin:heldout",), help="text to measure the dial on")
    fit: Mapping[str, Any] = setting({}, help="how much text the fit sees; may be repeated")
    train: Mapping[str, Any] = setting({}, help="how to train after it (default: not); may be repeated")
    overwrite: bool = setting(False, help="replace the output folder if it exists")


def run(config: Config) -> dict[str, Any]:
    """Adapt, save and report.

    Raises:
        SettingError: a setting, the model, the text or the output folder cannot be used.
    """
    out = check_output(config.out, overwrite=config.overwrite)
    processes.join(cpu=not (config.device or "cpu").startswith("cuda"))
    processes.wait()  # all have seen that nothing is there before one writes
    from rheostat import artifact
    from rheostat.adaptation import FitSettings, adapt
    from rheostat.methods import make_method
    from rheostat.train.settings import TrainSettings

    method = make_method({"name": config.method or _default_method()} | dict(config.settings))
    fit = from_mapping(FitSettings, config.fit, "fit.")
    train = from_mapping(TrainSettings, config.train, "train.")
    loaded = load(config.model, config)
    if loaded.is_artifact:
        raise bad_setting("model", config.model, "a dense model; this folder holds an adapted one")
    model = loaded.adapted.detach()
    num_parameters = sum(p.numel() for p in model.parameters())
    check_output(out, overwrite=config.overwrite, needed_bytes=BYTES_PER_PARAMETER * num_parameters)
    work_dir = out.absolute().parent / f".{out.absolute().name}.partial"
    try:
        with ProgressDisplay() as progress:
            adapted = adapt(
                model,
                loaded.tokenizer,
                method,
                _sources(config.data),
                held_out=_sources(config.held_out),
                fit=fit,
                train=train,
                seed=config.seed,
                work_dir=work_dir,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("run the same command again to resume") from None
    if processes.is_main():
        artifact.save(adapted, loaded.tokenizer, out, overwrite=config.overwrite)
        shutil.rmtree(work_dir, ignore_errors=True)
    processes.wait()
    figures = _figures(out, adapted, num_parameters)
    _show(console(), figures)
    if config.json:
        figures["provenance"] = artifact_origin(out, adapted.report, config.seed)
    return figures


def more_help() -> str:
    """What --set, --fit and --train take."""
    from rheostat.adaptation import FitSettings
    from rheostat.methods import METHODS
    from rheostat.train.settings import TrainSettings

    parts = [_settings_help(f"settings of {name}, for --set", cls) for name, cls in METHODS.items()]
    parts += [_settings_help("for --fit", FitSettings), _settings_help("for --train", TrainSettings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings_help(title: str, cls: type) -> str:
    docs = _field_docs(cls)
    lines = []
    for one in fields(cls):
        text = " ".join((one.metadata.get("help") or docs.get(one.name, "")).split())
        lines.append(f"  {one.name}={one.default}")
        lines += textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _field_docs(cls: type) -> dict[str, str]:
    """Field -> the docstring under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, below in pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = text
    return docs


def _default_method() -> str:
    from rheostat.methods import METHODS, Method

    return next(name for name in METHODS if name != Method.name)


def _sources(names: tuple[str, ...]) -> Any:
    """As `read_texts` wants them: several as `Path`s, because among several a string may be a text itself."""
    return names[0] if len(names) == 1 else [Path(name) for name in names]


def _figures(out: Path, adapted: Adapted, num_parameters: int) -> dict[str, Any]:
    report = adapted.report
    trained = report.get("trained", {})
    return {
        "path": str(out),
        "method": adapted.method.to_dict(),
        "num_parameters": num_parameters,
        "fit_tokens": report["fit"]["windows"] * report["fit"]["length"],
        "trained_tokens": trained.get("tokens", 0),
        "seconds": {
            "fit": report["fit_seconds"],
            "train": trained.get("seconds", 0.0),
            "dial": report["dial_seconds"],
        },
        "compute_low": adapted.dial.low,
        "dial": adapted.dial.to_dict(),
        "report": report,
    }


def _show(out: Console, figures: dict[str, Any]) -> None:
    seconds = figures["seconds"]
    stages = ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items() if value)
    out.print(f"saved    {figures['path']}")
    out.print(f"method   {figures['method']['name']}")
    out.print(f"tokens   {figures['fit_tokens']:,} to fit, {figures['trained_tokens']:,} to train")
    out.print(f"time     {stages or duration(0)}")
    out.print(f"compute  {figures['compute_low']:.3f} to 1")
    show_dial(out, figures["dial"])


def show_dial(out: Console, dial: dict[str, Any]) -> None:
    """Print the dial's table, and its shape in one line."""
    from rich.table import Table

    if len(dial["compute"]) < 2:
        out.print("dial     none: this model runs at compute 1 only")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("compute", *(f"{name} setting" for name in dial["settings"])):
        table.add_column(heading, justify="right")
    for row in zip(dial["compute"], *dial["settings"].values(), strict=True):
        table.add_row(f"{row[0]:.3f}", *(f"{value:.4g}" for value in row[1:]))
    out.print(f"dial     {sparkline(dial['compute'])}")
    out.print(table)
