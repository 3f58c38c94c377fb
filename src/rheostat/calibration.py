"""Measure the dial: walk the native setting from dense to cheapest on held-out text and note what each point costs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.adapted import Adapted
from rheostat.cost import head_cost
from rheostat.dial import Dial
from rheostat.errors import SettingError
from rheostat.methods.base import Progress, no_progress
from rheostat.spending import spend

if TYPE_CHECKING:
    from transformers import Cache

START = 1e-2
STEP = 2.0
NEAR_DENSE = 0.985
"""The walk stops on this side once so little is saved."""
NEAR_FLOOR = 0.01
"""The walk stops on the other side this close to the floor."""
FLAT = 1e-3
"""A step that changes compute by less than this has reached the end (pinned first tokens keep short text off
the floor)."""
MAX_GAP = 0.06
"""Between neighbouring points further apart than this, another is measured."""
SAME_SETTING = 1.02
"""Settings within this factor are not told apart."""
MAX_POINTS = 40


def _widest_gap(points: dict[float, float]) -> float | None:
    """The setting halfway (geometrically) between the two neighbours that differ most in compute, if that is
    too much."""
    ordered = sorted(points)
    gaps = [(abs(points[a] - points[b]), math.sqrt(a * b)) for a, b in pairwise(ordered) if b > a * SAME_SETTING]
    gap, setting = max(gaps, default=(0.0, 0.0))
    return setting if gap > MAX_GAP else None


def read_prompts(adapted: Adapted, prompts: torch.Tensor) -> Cache:
    """Read prompts [N, T] without padding through the method. Returns the filled cache."""
    cache = adapted.method.make_cache(adapted.model)
    adapted.method.prefill(adapted.model, prompts, torch.ones_like(prompts), cache)
    return cache


@torch.no_grad()
def measure_compute(
    adapted: Adapted, windows: torch.Tensor, native: dict[str, float], batch_tokens: int = 2048
) -> float:
    """`compute` that a native setting spends on windows [N, T], the head counted at every position but not run."""
    reads_prompts = adapted.method.at("prefill").reads_prompts
    with spend(native=native, keep_passes=False) as meter:
        for batch in windows.split(max(1, batch_tokens // windows.shape[1])):
            if reads_prompts:
                read_prompts(adapted, batch.to(adapted.device))
            else:
                families.decoder(adapted.model)(input_ids=batch.to(adapted.device), use_cache=False)
        if reads_prompts:
            return meter.compute
        meter.bill(head_cost(adapted.geometry, windows.numel(), adapted.dtype.itemsize))
    return meter.compute


def calibrate(adapted: Adapted, windows: torch.Tensor, *, progress: Progress = no_progress) -> Dial:
    """A dial for a model with one dialled method: native settings in steps of a factor of two, measured on
    windows [N, T].

    Raises:
        SettingError: several methods have dials.

    Text should be held out from the fit, and of the kinds that will be served: what a setting spends depends on it.
    """
    dialled = adapted.method.dialled()
    if not dialled:
        return Dial()
    measured = {"windows": len(windows), "tokens": windows.numel(), "length": windows.shape[1]}
    if len(dialled) > 1:
        names = " and ".join(method.name for method in dialled)
        raise SettingError(f"method: {names} each have a dial; a joint calibration of several is not there yet")
    name = dialled[0].name
    low, high = dialled[0].setting_range()
    steps = dialled[0].steps(adapted.geometry)
    if steps is not None:
        found = {}
        for done, one in enumerate(steps):
            progress("measuring the dial", done, len(steps))
            found[one] = measure_compute(adapted, windows, {name: one})
        progress("measuring the dial", len(steps), len(steps))
        return _dial(name, dialled[0].neutral(), found, measured)
    floor = dialled[0].floor(adapted.geometry)
    middle = (1 + floor) / 2
    points: dict[float, float] = {}

    def walk(setting: float, factor: float) -> None:
        before = None
        while low < setting <= high and len(points) < MAX_POINTS:
            progress("measuring the dial", len(points), len(points) + 1)
            points[setting] = spent = measure_compute(adapted, windows, {name: setting})
            is_there = spent > NEAR_DENSE if factor < 1 else spent < floor + NEAR_FLOOR
            is_flat = before is not None and abs(before - spent) < FLAT and (spent > middle) == (factor < 1)
            if is_there or is_flat:
                return
            before, setting = spent, setting * factor

    walk(START, STEP)
    walk(START / STEP, 1 / STEP)
    if math.isfinite(high) and high not in points:
        points[high] = measure_compute(adapted, windows, {name: high})
    while (between := _widest_gap(points)) and len(points) < MAX_POINTS:
        progress("measuring the dial", len(points), len(points) + 1)
        points[between] = measure_compute(adapted, windows, {name: between})
    progress("measuring the dial", len(points), len(points))
    return _dial(name, dialled[0].neutral(), points, measured)


def _dial(name: str, neutral: float, points: dict[float, float], measured: dict[str, Any]) -> Dial:
    """The table of one method's dial from setting -> measured compute."""
    table = [(1.0, neutral)]
    for setting in sorted(points):
        # Close to dense the routers' own cost may exceed what they save; such a point still anchors the interpolation.
        spent = min(points[setting], 1 - 1e-6)
        if len(table) == 2 and spent == table[1][0]:
            table[1] = (spent, setting)
        elif spent < table[-1][0] - 1e-7:
            table.append((spent, setting))
    computes, settings = zip(*table, strict=True)
    return Dial(compute=computes, settings={name: settings}, measured_on=measured)
