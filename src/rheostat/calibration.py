"""Measure the dial: walk the native setting from dense to cheapest on held-out text and note what each point costs."""

from __future__ import annotations

import math

import torch

from rheostat import families
from rheostat.adapted import Adapted
from rheostat.cost import head_cost
from rheostat.dial import Dial
from rheostat.methods.base import Progress, no_progress
from rheostat.spending import spend

START = 1e-2
STEP = 2.0
NEAR_DENSE = 0.985
"""The walk stops on this side once so little is saved."""
NEAR_FLOOR = 0.01
"""The walk stops on the other side this close to the floor."""
MAX_POINTS = 40


@torch.no_grad()
def measure_compute(adapted: Adapted, windows: torch.Tensor, native: dict[str, float], batch_tokens: int = 2048) -> float:
    """`compute` that a native setting spends on windows [N, T], the head counted at every position but not run."""
    with spend(native=native, keep_passes=False) as meter:
        for batch in windows.split(max(1, batch_tokens // windows.shape[1])):
            families.decoder(adapted.model)(input_ids=batch.to(adapted.device), use_cache=False)
        meter.bill(head_cost(adapted.geometry, windows.numel(), adapted.dtype.itemsize))
    return meter.compute


def calibrate(adapted: Adapted, windows: torch.Tensor, *, progress: Progress = no_progress) -> Dial:
    """A dial for a model with one dialled method: native settings in steps of a factor of two, measured on windows [N, T].

    Text should be held out from the fit, and of the kinds that will be served: what a setting spends depends on it.
    """
    name = adapted.method.name
    low, high = adapted.method.setting_range()
    if high <= low:
        return Dial()
    floor = adapted.method.floor(adapted.geometry)
    points: dict[float, float] = {}

    def walk(setting: float, factor: float) -> None:
        while low < setting <= high and len(points) < MAX_POINTS:
            progress("measuring the dial", len(points), len(points) + 1)
            points[setting] = spent = measure_compute(adapted, windows, {name: setting})
            if (spent > NEAR_DENSE) if factor < 1 else (spent < floor + NEAR_FLOOR):
                return
            setting *= factor

    walk(START, STEP)
    walk(START / STEP, 1 / STEP)
    if math.isfinite(high) and high not in points:
        points[high] = measure_compute(adapted, windows, {name: high})
    progress("measuring the dial", len(points), len(points))
    table = [(1.0, adapted.method.neutral())]
    for setting in sorted(points):
        # Neighbours that measure the same (or, by the routers' own cost, above dense) are of no use for interpolation.
        if points[setting] < table[-1][0] - 1e-6:
            table.append((points[setting], setting))
    computes, settings = zip(*table, strict=True)
    measured = {"windows": len(windows), "tokens": windows.numel(), "length": windows.shape[1]}
    return Dial(compute=computes, settings={name: settings}, measured_on=measured)
