"""Time and memory at several settings of the dial, against stock transformers, and against what the machine can do.

All sides are warm and take turns, round by round. Stock transformers runs in several dtypes and the quickest is what
others are compared with; llama.cpp joins in where it is installed and the model's GGUF file is known. Every time
stands beside the bytes and FLOPs it moved and the fraction of the machine's own roof (docs/bench.md).

Example:
  rheostat bench smol-dial --compute 1.0,0.7
  rheostat bench smol-dial --compute 0.7 --prompts 128,1024 --batch 1,4 --new 64 --dtype bfloat16 --out figures
  rheostat bench --roof
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat.commands import Loaded, check_computes, check_context, load, timings
from rheostat.config import Common, setting
from rheostat.errors import SettingError, bad_setting
from rheostat.folders import check_output
from rheostat.report import origin
from rheostat.terminal import ProgressDisplay

if TYPE_CHECKING:
    import torch

    from rheostat.bench.roof import Roof
    from rheostat.bench.sides import Side, SideSpec

DEFAULT_COMPUTE = (1.0, 0.7)


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat bench`."""

    model: str | None = setting(None, help="an adapted model, or a dense one", flag=False)
    compute: tuple[float, ...] = setting((), help="settings of the dial (default: 1.0,0.7 as far as it reaches)")
    prompts: tuple[int, ...] = setting((128, 512, 1024), help="lengths of prompts in tokens")
    batch: tuple[int, ...] = setting((1, 4, 8), help="rows at once; the first is used for all prompts")
    new: int = setting(32, help="tokens to write after each prompt")
    rounds: int = setting(5, help="rounds that count; one more warms up")
    stock: tuple[str, ...] = setting(
        ("float32", "bfloat16", "float16"), help="dtypes to try stock transformers in (--dtype is the dial's)"
    )
    weights: tuple[str, ...] = setting(
        ("bf16", "int8"), help="formats to try our own runtime in: fp32, bf16, fp16, int8, int4, mixed; empty for none"
    )
    draft: tuple[str, ...] = setting(
        (), help="time our own runtime with drafts too: self, low_dial, prompt_lookup (default: none)"
    )
    draft_length: str = setting("4", help="tokens to guess at a time, at most; auto takes what pays by measured times")
    llama: bool = setting(True, help="run llama.cpp too, where it is installed and the GGUF file is known")
    gguf: str | None = setting(None, help="the model's GGUF file (default: a bundled model's own)")
    memory: bool = setting(True, help="measure peak memory, each side in a new process")
    threads: int = setting(0, help="threads inside products; 0 leaves it to torch")
    data: str = setting("builtin:heldout", help="text that the prompts are cut from")
    roof: bool = setting(False, help="without a model: measure the machine alone")
    refresh: bool = setting(False, help="measure the roof again, though it is known")
    out: str | None = setting(None, help="folder for bench.json (default: it is not written)")


def run(config: Config) -> dict[str, Any]:
    """Measure, print the tables, and write the figures if asked.

    Raises:
        SettingError: a setting is out of range, or the model cannot be used.
    """
    _check(config)
    from rheostat.bench.timing import threads
    from rheostat.models import check_device, check_dtype

    check_device(config.device)
    for dtype in config.stock:
        check_dtype(dtype, "stock")
    check_dtype(config.dtype)
    with threads(config.threads):
        return _roof_alone(config) if config.model is None else _bench(config, config.model)


def _check(config: Config) -> None:
    if config.model is None and not config.roof:
        raise SettingError("model: must be given (or --roof, for the machine alone)")
    for name, values in (("prompts", config.prompts), ("batch", config.batch)):
        if not values or min(values) < 1:
            raise bad_setting(name, ",".join(map(str, values)), "numbers of 1 or more")
    for name, value, least in (("new", config.new, 2), ("rounds", config.rounds, 1), ("threads", config.threads, 0)):
        if value < least:
            raise bad_setting(name, value, f"{least} or more")
    if config.draft:
        _draft_length(config)
        if not config.weights:
            raise bad_setting("draft", ",".join(config.draft), "left out where --weights is empty")
    if config.out is not None:
        check_output(config.out, overwrite=True, is_replaced=False)


def _draft_length(config: Config) -> int | str:
    from rheostat.speculate.pacing import Pace

    return Pace.read(config.draft_length)


# -- the machine alone


def _roof_alone(config: Config) -> dict[str, Any]:
    load_before = os.getloadavg()[0]
    with ProgressDisplay() as progress:
        roof = _roof(config, progress)
    figures: dict[str, Any] = {"roof": roof.to_dict(), "load": load_before}
    if config.json or config.out is not None:
        figures["provenance"] = origin(seed=config.seed)
    _hand_over(config, figures)
    return figures


def _hand_over(config: Config, figures: dict[str, Any]) -> None:
    timings.show(figures)
    if config.out is not None:
        timings.write(Path(config.out), figures)


def _roof(config: Config, progress: ProgressDisplay) -> Roof:
    from rheostat.bench.roof import measure_roof

    return measure_roof(config.device, refresh=config.refresh, progress=progress)


# -- a model


def _bench(config: Config, model: str) -> dict[str, Any]:
    from rheostat.bench.measuring import plan, time_cell

    load_before = os.getloadavg()[0]
    loaded = load(model, config)
    computes = config.compute or tuple(c for c in DEFAULT_COMPUTE if c >= loaded.adapted.dial.low)
    check_computes(loaded.adapted, computes)
    _check_drafts(config, loaded)
    longest = max(config.prompts)
    check_context(loaded.adapted, "prompts", longest, longest + config.new)
    windows = _windows(config, loaded)
    notes: list[str] = []
    specs = _specs(config, loaded, model, computes, notes)
    figures: dict[str, Any] = {
        "model": model,
        "method": loaded.adapted.method.to_dict(),
        "settings": {name: getattr(config, name) for name in ("new", "rounds", "dtype", "data", "device")}
        | {name: list(getattr(config, name)) for name in ("prompts", "batch", "stock", "weights", "draft")}
        | {"compute": list(computes)},
        "load": load_before,
        "rows": [],
        "memory": [],
        "notes": notes,
    }
    with ProgressDisplay() as progress:
        roof = _roof(config, progress)
        figures["roof"] = roof.to_dict()
        if config.memory:  # before the sides are loaded here, so that there is room
            figures["memory"] = _memory(config, specs, windows, progress)
        sides = _load_sides(specs, loaded, progress)
        for cell in plan(config.prompts, config.batch):
            found, left_out = time_cell(
                sides, windows, cell, new=config.new, rounds=config.rounds, roof=roof, progress=progress
            )
            figures["rows"] += found
            notes += left_out
    if config.json or config.out is not None:
        figures["provenance"] = loaded.origin(config.seed)
    _hand_over(config, figures)
    return figures


def _check_drafts(config: Config, loaded: Loaded) -> None:
    if config.draft:
        from rheostat.bench.drafted import check_drafter

        for name in config.draft:
            check_drafter(name, loaded.adapted)


def _windows(config: Config, loaded: Loaded) -> torch.Tensor:
    """Prompts [N, T] of real text: what a router decides depends on it."""
    from rheostat.text import pack, read_texts

    rows, length = max(config.batch), max(config.prompts)
    texts = read_texts(config.data)
    windows = pack(loaded.tokenizer, texts, length=max(2, length), limit=rows, seed=config.seed, name="data")
    if len(windows) < rows:
        raise bad_setting("data", config.data, f"enough text for {rows} prompts of {length} tokens")
    return windows.to(loaded.adapted.device)


def _specs(config: Config, loaded: Loaded, model: str, computes: Sequence[float], notes: list[str]) -> list[SideSpec]:
    from rheostat.bench import llama
    from rheostat.bench.sides import SideSpec

    common: dict[str, Any] = {"device": config.device, "threads": config.threads}
    stock = dict.fromkeys(_full_name(dtype) for dtype in config.stock)
    dial: dict[str, Any] = {"kind": "dial", "model": model, "dtype": _full_name(config.dtype)}
    specs = [SideSpec(kind="stock", model=model, dtype=dtype, **common) for dtype in stock]
    specs += [SideSpec(compute=compute, **dial, **common) for compute in dict.fromkeys(computes)]
    specs += _native_specs(config, loaded, dict.fromkeys(computes), dial | common, notes)
    if not config.llama:
        return specs
    if not llama.is_installed():
        if config.gguf is not None:
            raise bad_setting("gguf", config.gguf, "left out, or llama.cpp installed: pip install 'rheostat[llama]'")
        notes.append("llama.cpp: not measured, it is not installed (pip install 'rheostat[llama]')")
        return specs
    file = Path(config.gguf) if config.gguf else llama.find_gguf(model, loaded.adapted.report.get("base_digest"))
    if file is None:
        notes.append("llama.cpp: not measured, no GGUF file of this model is known (--gguf names one)")
        return specs
    if not file.is_file():
        raise bad_setting("gguf", str(file), "a file")
    context = max(config.prompts) + config.new
    return [*specs, SideSpec(kind="llama.cpp", model=str(file), context=context, **common)]


def _native_specs(
    config: Config, loaded: Loaded, computes: Iterable[float], common: dict[str, Any], notes: list[str]
) -> list[SideSpec]:
    """Of our own runtime: each format at each setting of the dial; a note where it does not run this model."""
    from rheostat.bench.sides import SideSpec
    from rheostat.runtime.building import Unsupported
    from rheostat.runtime.packing import check_format

    specs: list[SideSpec] = []
    for name in config.weights:
        format = check_format(name, loaded.adapted.dtype)
        try:
            loaded.adapted.new_runtime(format)
        except Unsupported as reason:
            notes.append(f"native {format}: not measured, the runtime does not support {reason}")
            continue
        wanted = common | {"kind": "native", "weights": format, "context": config.new}
        specs += [SideSpec(compute=compute, **wanted) for compute in computes]
        drafted = wanted | ({"draft_length": _draft_length(config)} if config.draft else {})
        specs += [
            SideSpec(compute=compute, draft=draft, **drafted)
            for draft in dict.fromkeys(config.draft)
            for compute in computes
        ]
    return specs


def _full_name(dtype: str) -> str:
    """float16 for fp16."""
    from rheostat.models import check_dtype

    return str(check_dtype(dtype)).removeprefix("torch.")


def _memory(
    config: Config, specs: Sequence[SideSpec], windows: torch.Tensor, progress: ProgressDisplay
) -> list[dict[str, Any]]:
    """Each side on the longest prompt at the first batch size."""
    from rheostat.bench.memory import measure_memory

    prompt, batch = max(config.prompts), config.batch[0]
    found = []
    for place, spec in enumerate(specs):
        progress("memory", place, len(specs))
        row: dict[str, Any] = {"side": spec.label, "prompt": prompt, "batch": batch}
        if spec.kind == "llama.cpp" and batch > 1:
            continue
        found.append(row | measure_memory(spec, windows[:batch, :prompt], config.new, config.threads))
    progress("memory", len(specs), len(specs))
    return found


def _load_sides(specs: Sequence[SideSpec], loaded: Loaded, progress: ProgressDisplay) -> list[Side]:
    """All sides, alive at once: only so can they take turns. The dial's share one model."""
    from rheostat.bench.sides import make_side

    sides: list[Side] = []
    for place, spec in enumerate(specs):
        progress("loading", place, len(specs))
        mine = loaded.adapted if spec.kind in ("dial", "native") else None
        twin = next((side for side in sides if mine and _same_weights(side.spec, spec)), None)
        sides.append(make_side(spec, mine, twin))
    progress("loading", len(specs), len(specs))
    return sides


def _same_weights(one: SideSpec, other: SideSpec) -> bool:
    return one.kind == other.kind == "native" and one.weights == other.weights
