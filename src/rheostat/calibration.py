"""Measure the dial: walk the native setting from dense to cheapest on held-out text and note what each point costs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from rheostat import families, joint
from rheostat.adapted import Adapted
from rheostat.cost import head_cost
from rheostat.dial import Dial
from rheostat.methods.base import Method, Progress, no_progress
from rheostat.spending import spend

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
LEVEL_WINDOWS = 2
"""So many are read to choose each method's settings, where several are measured together."""


def _widest_gap(points: dict[float, float]) -> float | None:
    """The setting halfway (geometrically) between the two neighbours that differ most in compute, if that is
    too much."""
    ordered = sorted(points)
    gaps = [(abs(points[a] - points[b]), math.sqrt(a * b)) for a, b in pairwise(ordered) if b > a * SAME_SETTING]
    gap, setting = max(gaps, default=(0.0, 0.0))
    return setting if gap > MAX_GAP else None


@torch.no_grad()
def measure_compute(
    adapted: Adapted, windows: torch.Tensor, native: dict[str, float], batch_tokens: int = 2048
) -> float:
    """`compute` that a native setting spends on windows [N, T], the head counted at every position but not run."""
    return measure_widths(adapted, windows, native, batch_tokens)[0]


@torch.no_grad()
def measure_widths(
    adapted: Adapted, windows: torch.Tensor, native: dict[str, float], batch_tokens: int = 2048
) -> tuple[float, tuple[float, ...]]:
    """The same, and each routed layer's mean FFN width as a share of the full one."""
    reads_prompts = adapted.method.at("prefill").reads_prompts
    with spend(native=native, keep_passes=False) as meter:
        for batch in windows.split(max(1, batch_tokens // windows.shape[1])):
            if reads_prompts:
                joint.read_prompts(adapted, batch.to(adapted.device))
            else:
                families.decoder(adapted.model)(input_ids=batch.to(adapted.device), use_cache=False)
        if reads_prompts:
            return meter.compute, tuple(meter.layer_fractions())
        meter.bill(head_cost(adapted.geometry, windows.numel(), adapted.dtype.itemsize))
    return meter.compute, tuple(meter.layer_fractions())


def calibrate(adapted: Adapted, windows: torch.Tensor, *, progress: Progress = no_progress) -> Dial:
    """A dial for a model, measured on windows [N, T].

    One dialled method: its steps, or native settings in steps of a factor of two. Several: a path of joint settings.

    Text should be held out from the fit, and of the kinds that will be served: what a setting spends depends on it.
    """
    dialled = adapted.method.dialled()
    if len(dialled) > 1:
        levels = [_levels(adapted, method, windows, progress) for method in dialled]
        return joint.walk(joint.Answers(adapted, windows), dialled, levels, progress)
    return _calibrate_one(adapted, dialled[0], windows, progress) if dialled else Dial()


def _measured_on(windows: torch.Tensor) -> dict[str, Any]:
    return {"windows": len(windows), "tokens": windows.numel(), "length": windows.shape[1]}


def _calibrate_one(adapted: Adapted, method: Method, windows: torch.Tensor, progress: Progress) -> Dial:
    """The dial of one method, all others at their neutral settings."""
    name = method.name
    low, high = method.setting_range()
    steps = method.steps(adapted.geometry)
    if steps is not None:
        found = {}
        for done, one in enumerate(steps):
            progress("measuring the dial", done, len(steps))
            found[one] = measure_compute(adapted, windows, {name: one})
        progress("measuring the dial", len(steps), len(steps))
        return _dial(name, method.neutral(), found, _measured_on(windows))
    floor = method.floor(adapted.geometry)
    middle = (1 + floor) / 2
    points: dict[float, float] = {}
    widths: dict[float, tuple[float, ...]] = {method.neutral(): (1.0,) * adapted.geometry.num_layers}

    def measure(setting: float) -> float:
        spent, widths[setting] = measure_widths(adapted, windows, {name: setting})
        return spent

    def walk(setting: float, factor: float) -> None:
        before = None
        while low < setting <= high and len(points) < MAX_POINTS:
            progress("measuring the dial", len(points), len(points) + 1)
            points[setting] = spent = measure(setting)
            is_there = spent > NEAR_DENSE if factor < 1 else spent < floor + NEAR_FLOOR
            is_flat = before is not None and abs(before - spent) < FLAT and (spent > middle) == (factor < 1)
            if is_there or is_flat:
                return
            before, setting = spent, setting * factor

    walk(START, STEP)
    walk(START / STEP, 1 / STEP)
    if math.isfinite(high) and high not in points:
        points[high] = measure(high)
    while (between := _widest_gap(points)) and len(points) < MAX_POINTS:
        progress("measuring the dial", len(points), len(points) + 1)
        points[between] = measure(between)
    progress("measuring the dial", len(points), len(points))
    dial = _dial(name, method.neutral(), points, _measured_on(windows))
    if not method.holds:
        return dial
    return replace(dial, profile={name: tuple(widths[setting] for setting in dial.settings[name])})


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


# -- several methods


def _levels(adapted: Adapted, method: Method, windows: torch.Tensor, progress: Progress) -> tuple[float, ...]:
    """The settings of one method among several that a joint path may use. What each of them spends the path measures
    for itself; here a few windows say how far apart they are."""
    steps = method.steps(adapted.geometry)
    if steps is not None and len(steps) <= joint.MAX_LEVELS:
        return (method.neutral(), *steps)
    return joint.levels_of(_calibrate_one(adapted, method, windows[:LEVEL_WINDOWS], progress), method.name)
