"""What this machine can do at best: the roof that achieved bandwidth and FLOP/s are compared with.

Three rates, each the best of several runs:

- plain reading of a block of memory far larger than the caches;
- one-row products (decoding a token) by dtype, over as many weights: how fast the weights stream through that kernel;
- matrix products (reading a prompt) by dtype, at the size where the machine is quickest.

The roof for bytes is the fastest of all reads, whatever kernel did it; the roof for FLOPs is that of the dtype. It is
measured once for a machine, a number of threads and a version of torch, and kept in rheostat's cache.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rheostat.bench.timing import Clock, fastest, waiter
from rheostat.errors import SettingError
from rheostat.folders import cache_folder
from rheostat.methods.base import Progress, no_progress
from rheostat.provenance import hardware
from rheostat.report import to_json, write_whole

logger = logging.getLogger(__name__)

VERSION = 1
"""Raise it when what is measured changes: older files are then measured again."""

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is read and multiplied."""

    block_bytes: int
    """Of memory read, and of all weights of the one-row products together: far more than the caches hold."""
    width: int
    """Rows and columns of one weight."""
    smallest: int
    largest: int
    """Rows and columns of the square products tried: doubled until one takes `long_enough`."""
    long_enough: float = 0.05
    """Seconds."""
    repeats: int = 5


CPU = Sizes(block_bytes=512 << 20, width=2048, smallest=256, largest=4096)
ACCELERATOR = Sizes(block_bytes=2 << 30, width=8192, smallest=2048, largest=16384)


@dataclass(frozen=True, kw_only=True)
class Roof:
    """Rates of one machine."""

    machine: Mapping[str, Any]
    """What it was measured on, and the key it is kept under: device, threads, torch."""
    read: float
    """Bytes a second of plain reading."""
    rows: Mapping[str, float]
    """dtype -> bytes of weights a second in one-row products."""
    products: Mapping[str, float]
    """dtype -> FLOP/s (for int8: operations a second) of matrix products."""
    load: float
    """Mean number of processes that wanted to run in the minute before."""
    time: str

    @property
    def bandwidth(self) -> float:
        """Bytes a second: the fastest of all reads."""
        return max(self.read, *self.rows.values())

    def flops(self, dtype: str) -> float:
        """FLOP/s for weights of this dtype; of the machine's best, for a format that torch does not multiply."""
        return self.products.get(dtype) or max(self.products.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self) | {"bandwidth": self.bandwidth}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Roof:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        rows, products = ({str(k): float(v) for k, v in kept[name].items()} for name in ("rows", "products"))
        if not rows or not products or min(float(kept["read"]), *rows.values(), *products.values()) <= 0:
            raise ValueError("rates must be above 0")
        return cls(
            machine=dict(kept["machine"]),
            read=float(kept["read"]),
            rows=rows,
            products=products,
            load=float(kept["load"]),
            time=str(kept["time"]),
        )


def measure_roof(
    device: str | torch.device = "cpu",
    *,
    refresh: bool = False,
    sizes: Sizes | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = no_progress,
) -> Roof:
    """This machine's roof, at torch's present number of threads: from the cache, or measured (some seconds) and kept.

    Args:
        device: as `torch` names it.
        refresh: measure although it is in the cache.
        sizes: how much to read and multiply (default: by the kind of device).
    """
    device = torch.device(device)
    facts = machine(device)
    path = roof_file(facts)
    if not refresh and (kept := _read(path, facts)) is not None:
        return kept
    load = os.getloadavg()[0]
    sizes = sizes or (CPU if device.type == "cpu" else ACCELERATOR)
    roof = _measure(device, sizes, clock, progress, facts, load)
    try:
        write_whole(path, (to_json(roof.to_dict(), indent=2) + "\n").encode())
    except SettingError as error:  # not worth failing for: the next run measures again
        logger.warning("the roof is not kept: %s", error)
    return roof


def machine(device: torch.device) -> dict[str, Any]:
    """What decides the roof, of this process on `device`."""
    facts = hardware()
    if device.type == "cpu":
        place = {"device": facts["processor"], "cores": facts["cores"], "simd": facts["simd"]}
        return {"version": VERSION, "threads": facts["threads"], "torch": torch.__version__} | place
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"version": VERSION, "device": name, "torch": torch.__version__}


def roof_file(facts: Mapping[str, Any]) -> Path:
    """Where the roof of a machine with these facts is kept."""
    key = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "roof" / f"{key[:16]}.json"


def _read(path: Path, facts: Mapping[str, Any]) -> Roof | None:
    try:
        roof = Roof.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return roof if roof.machine == facts else None


# -- measuring


@torch.inference_mode()
def _measure(
    device: torch.device, sizes: Sizes, clock: Clock, progress: Progress, facts: Mapping[str, Any], load: float
) -> Roof:
    wait = waiter(device)
    generator = torch.Generator(device).manual_seed(0)
    what, steps = "measuring the machine", 1 + 2 * (len(FLOATS) + 1)
    progress(what, 0, steps)
    read = _read_rate(device, sizes, wait, clock)
    rows: dict[str, float] = {}
    products: dict[str, float] = {}
    done = 1
    for dtype in (*FLOATS, "int8"):
        for rates, rate in ((rows, _row_rate), (products, _product_rate)):
            progress(what, done, steps)
            done += 1
            try:
                rates[dtype] = rate(dtype, device, sizes, generator, wait, clock)
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                # Not every build has every kernel, and those for int8 are not yet public.
                logger.debug("%s cannot be measured: %s", dtype, error)
    progress(what, steps, steps)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Roof(machine=facts, read=read, rows=rows, products=products, load=load, time=now)


def _read_rate(device: torch.device, sizes: Sizes, wait: Callable[[], None], clock: Clock) -> float:
    """Bytes a second. Two reductions, because neither is the fastest everywhere."""
    block = torch.ones(sizes.block_bytes // 4, device=device)
    best = min(fastest(action, wait, clock, sizes.repeats) for action in (block.sum, block.amax))
    return block.nbytes / best


def _row_rate(
    dtype: str, device: torch.device, sizes: Sizes, generator: torch.Generator, wait: Callable[[], None], clock: Clock
) -> float:
    """Bytes of weights a second that one row meets."""
    first = _random(dtype, sizes.width, device, generator)
    weights = [first.clone() for _ in range(max(1, sizes.block_bytes // first.nbytes))]
    step = _one_row(dtype, sizes.width, device)

    def action() -> None:
        for weight in weights:
            step(weight)

    return len(weights) * first.nbytes / fastest(action, wait, clock, sizes.repeats)


def _product_rate(
    dtype: str, device: torch.device, sizes: Sizes, generator: torch.Generator, wait: Callable[[], None], clock: Clock
) -> float:
    """FLOP/s of square products; the best over the sizes tried."""
    best = 0.0
    for size in _doubling(sizes.smallest, sizes.largest):
        a, b = (_random(dtype, size, device, generator) for _ in range(2))
        # The second factor lies as a linear layer's weight does: another layout can be many times slower.
        action = partial(torch._int_mm, a, b.T) if dtype == "int8" else partial(torch.nn.functional.linear, a, b)
        seconds = fastest(action, wait, clock, sizes.repeats)
        best = max(best, 2 * size**3 / seconds)
        if seconds >= sizes.long_enough:
            break
    return best


def _doubling(low: int, high: int) -> Iterator[int]:
    while low <= high:
        yield low
        low *= 2


def _one_row(dtype: str, width: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """One row times a weight [width, width]. With int8 weights the row and the result are bfloat16."""
    if dtype != "int8":
        row = torch.ones(1, width, dtype=FLOATS[dtype], device=device)
        return lambda weight: torch.nn.functional.linear(row, weight)
    row, scales = (torch.ones(*shape, dtype=torch.bfloat16, device=device) for shape in ((1, width), (width,)))
    return lambda weight: torch._weight_int8pack_mm(row, weight, scales)


def _random(dtype: str, size: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """[size, size]. Random, because some accelerators are quicker on zeros."""
    if dtype == "int8":
        return torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device, generator=generator)
    return torch.randn(size, size, device=device, generator=generator).to(FLOATS[dtype])
