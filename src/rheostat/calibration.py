"""Measure the dial: walk the native setting from dense to cheapest on held-out text and note what each point costs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.adapted import Adapted
from rheostat.cost import head_cost
from rheostat.dial import Dial
from rheostat.meter import Meter
from rheostat.methods.base import Method, Progress, no_progress
from rheostat.spending import in_phase, spend

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
PROMPT_SHARE = 0.75
"""Of each window, when several methods are measured together: the rest is what is written after the prompt."""
MAX_LEVELS = 5
"""Settings of each method that a joint path may use, beside the neutral one."""


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


def read_and_answer(adapted: Adapted, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the first part of each window [N, T] for a prompt, read through the method, and the rest for the answer,
    scored in one pass on the cache that was filled.

    Returns:
        Logits [N, A, V] and the tokens that they should have predicted, [N * A].
    """
    num_prompt = max(1, round(PROMPT_SHARE * windows.shape[1]))
    cache = read_prompts(adapted, windows[:, :num_prompt])
    with in_phase("decode"):
        logits = adapted(input_ids=windows[:, num_prompt:-1], past_key_values=cache, use_cache=True).logits
    return logits, windows[:, num_prompt + 1 :].flatten()


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
                read_prompts(adapted, batch.to(adapted.device))
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
        return _calibrate_jointly(adapted, dialled, windows, progress)
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


@torch.no_grad()
def measure_quality(
    adapted: Adapted, windows: torch.Tensor, native: dict[str, float], batch_tokens: int = 2048
) -> tuple[float, float]:
    """`compute` spent and loss in nats a token when the first part of each window [N, T] is a prompt and the rest is
    written after it, at a native setting of several methods."""
    total, count, meter = 0.0, 0, Meter(keep_passes=False)
    for batch in windows.to(adapted.device).split(max(1, batch_tokens // windows.shape[1])):
        with spend(native=native, meter=meter):
            logits, targets = read_and_answer(adapted, batch)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
        count += len(targets)
    return meter.compute, total / count


def _calibrate_jointly(adapted: Adapted, dialled: list[Method], windows: torch.Tensor, progress: Progress) -> Dial:
    """A path of joint settings from dense to cheapest, along the measured front of quality against compute.

    Each method offers a few settings of its own; the path goes from point to point, each time turning the one method
    whose next setting costs the least quality for what it saves. So no method is ever turned back, and `compute` falls.
    """
    levels: list[list[float]] = []
    for method in dialled:
        own = _calibrate_one(adapted, method, windows, progress).settings[method.name]
        levels.append([own[round(k * (len(own) - 1) / MAX_LEVELS)] for k in range(MAX_LEVELS + 1)])
        levels[-1] = list(dict.fromkeys(levels[-1]))
    measured: dict[tuple[int, ...], tuple[float, float]] = {}

    def measure(at: tuple[int, ...]) -> tuple[float, float]:
        if at not in measured:
            progress("measuring joint settings", len(measured), len(measured) + 1)
            native = {m.name: own[i] for m, own, i in zip(dialled, levels, at, strict=True)}
            measured[at] = measure_quality(adapted, windows, native)
        return measured[at]

    def price(start: tuple[int, ...], end: tuple[int, ...]) -> float:
        (spent, loss), (less, worse) = measure(start), measure(end)
        return (worse - loss) / (spent - less) if spent > less else math.inf

    at = (0,) * len(dialled)
    path = [at]
    while nexts := [(*at[:k], i + 1, *at[k + 1 :]) for k, i in enumerate(at) if i + 1 < len(levels[k])]:
        at = min(nexts, key=lambda end: price(path[-1], end))
        path.append(at)
    progress("measuring joint settings", len(measured), len(measured))
    kept = [path[0]]
    computes = [1.0]
    for one in path[1:]:
        if (spent := measure(one)[0]) < computes[-1] - 1e-7:
            kept.append(one)
            computes.append(spent)
    settings = {
        method.name: tuple(own[one[k]] for one in kept)
        for k, (method, own) in enumerate(zip(dialled, levels, strict=True))
    }
    losses = [round(measure(one)[1], 5) for one in kept]
    about = _measured_on(windows) | {"prompt_share": PROMPT_SHARE, "loss": losses}
    return Dial(compute=tuple(computes), settings=settings, measured_on=about)
