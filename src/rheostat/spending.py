"""How the dial travels from the caller to the layers: a context variable.

Keyword arguments of a model do not reach its MLPs, so a layer reads what was asked here, and writes what it spent
to the meter here. A context variable keeps threads and asynchronous tasks apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import nn

from rheostat.errors import bad_setting
from rheostat.meter import Meter

PHASES = ("prefill", "decode")

Compute = float | Sequence[float] | torch.Tensor
"""A fraction of the dense model's FLOPs a token, in (0, 1]; with one entry a row, requests with different
dials share a batch."""


@dataclass(frozen=True)
class Spending:
    """What was asked, by phase, and the meter that counts what is spent."""

    prefill: tuple[float, ...]
    """One entry for all rows, or one a row."""
    decode: tuple[float, ...]
    meter: Meter
    override: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    """(layer, x [N, D]) -> expert [N]: replaces the routers' choice, for baselines, oracles and training."""
    native: Mapping[str, float] | None = None
    """Method name -> native setting for all rows: bypasses the dial, for calibration and training."""
    hold: bool = False
    """Steer each row by what it has spent."""

    def rows(self, phase: str, num_rows: int) -> tuple[float, ...]:
        """The asked `compute` of each of `num_rows` rows. Beams and samples of one request are neighbours and
        share its entry."""
        asked = self.prefill if phase == "prefill" else self.decode
        if num_rows % len(asked):
            raise bad_setting("compute", asked, f"one number, or one a row: the batch has {num_rows} rows")
        repeat = num_rows // len(asked)
        return tuple(value for value in asked for _ in range(repeat))


_spending: ContextVar[Spending | None] = ContextVar("rheostat_spending", default=None)


def current_spending() -> Spending | None:
    """What was asked where we are, or None outside `spend`: then every model runs dense and nothing is counted."""
    return _spending.get()


@contextmanager
def spend(
    compute: Compute | Mapping[str, Compute] = 1.0,
    *,
    keep_passes: bool = True,
    meter: Meter | None = None,
    native: Mapping[str, float] | None = None,
    override: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    hold: bool = False,
) -> Iterator[Meter]:
    """Run adapted models at `compute` inside the block, and count what they spend.

    Args:
        compute: fraction of the dense model's FLOPs a token, in (0, 1]; a list or a tensor gives one entry a row;
            `{"prefill": 0.5, "decode": 0.8}` sets the phases apart (a phase left out runs at 1.0).
        keep_passes: keep the widths of every forward pass in the meter, not only of the newest.
        meter: count into this one, not into a new one.
        native: method name -> native setting; used instead of `compute` (for calibration and training).
        override: (layer, x [N, D]) -> expert [N]; used instead of the routers (for baselines and oracles).
        hold: steer each request by what it has spent, so that it ends at what was asked; without, the dial's table
            decides alone, and `compute` is a mean over text.

    Yields:
        The `Meter`.

    Raises:
        SettingError: `compute` is not a number in (0, 1], or names an unknown phase.
    """
    by_phase: Mapping[str, Compute] = compute if isinstance(compute, Mapping) else dict.fromkeys(PHASES, compute)
    if unknown := set(by_phase) - set(PHASES):
        raise bad_setting("compute", sorted(unknown)[0], "a number, or a mapping with the keys prefill and decode")
    prefill, decode = (_check_compute(by_phase.get(phase, 1.0)) for phase in PHASES)
    meter = meter or Meter(keep_passes=keep_passes)
    token = _spending.set(Spending(prefill, decode, meter, override, native, hold))
    try:
        yield meter
    finally:
        _spending.reset(token)


def _check_compute(value: Compute) -> tuple[float, ...]:
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    try:
        numbers = tuple(float(v) for v in value) if isinstance(value, list | tuple) else (float(value),)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise bad_setting("compute", value, "a number in (0, 1], or one a row") from None
    if not numbers or any(math.isnan(v) or not 0 < v <= 1 for v in numbers):
        raise bad_setting("compute", value, "a number in (0, 1], or one a row")
    return numbers


@contextmanager
def for_rows(rows: Sequence[int], num_rows: int) -> Iterator[None]:
    """Inside the block a batch consists of these rows of one of `num_rows`, each with what was asked for it."""
    spending = current_spending()
    if spending is None:
        yield
        return
    prefill, decode = (tuple(spending.rows(phase, num_rows)[row] for row in rows) for phase in PHASES)
    token = _spending.set(replace(spending, prefill=prefill, decode=decode))
    try:
        yield
    finally:
        _spending.reset(token)


class Held(Protocol):
    """One pass of rows that are held to what they asked for (`holding`)."""

    def setting(self, layer: int) -> Any:
        """The native settings of a layer, [B] or [B, C] float64 (numpy): of each row, or of each of its C tokens."""

    def took(self, layer: int, saved: Any) -> None:
        """Weights [B, T] that the tokens left out in that layer."""


@dataclass(frozen=True)
class Pass:
    """Facts about the forward pass in progress that the layers need and `transformers` does not hand them."""

    phase: str
    """`prefill` (a prompt, or a chunk of one) or `decode` (one token after a filled cache)."""
    valid: torch.Tensor
    """[B, T] bool, False for padding."""
    first: torch.Tensor
    """[B, T] bool, True for each row's very first token."""
    settings: Mapping[str, torch.Tensor]
    """Method name -> native setting of each row [B]; empty when all run dense."""
    is_plain: bool = False
    """No padding and no first token among these: the common decode step, which can skip the masks."""
    past: int = 0
    """Tokens in the cache before this pass, padding included."""
    mask: torch.Tensor | None = None
    """[B, past + T], the attention mask, where the caller gave a plain one."""
    held: Held | None = None
    """Set where requests are held: it has the settings, and wants to know what they came to."""


_phase: ContextVar[str | None] = ContextVar("rheostat_phase", default=None)


def current_phase() -> str | None:
    """The phase that the caller declared, or None: then the shape of the pass tells."""
    return _phase.get()


@contextmanager
def in_phase(phase: str) -> Iterator[None]:
    """Passes inside are of `phase`, whatever their shape: to check several drafted tokens at once is
    decoding, and a prompt's last token, read on its own, is not.

    Raises:
        SettingError: for an unknown phase.
    """
    if phase not in PHASES:
        raise bad_setting("phase", phase, f"one of {', '.join(PHASES)}")
    token = _phase.set(phase)
    try:
        yield
    finally:
        _phase.reset(token)


Resolve = Callable[[str, int, torch.device], Mapping[str, torch.Tensor]]
_resolvers: WeakKeyDictionary[nn.Module, WeakMethod[Resolve]] = WeakKeyDictionary()


def register_dial(model: nn.Module, resolve: Resolve) -> None:
    """From now on `native_settings` of `model` come from the method `resolve` of an object, which is not kept alive."""
    _resolvers[model] = WeakMethod(resolve)


def has_dial(model: nn.Module) -> bool:
    """Whether `model` has one: it is adapted."""
    return model in _resolvers


def unregister_dial(model: nn.Module) -> None:
    """`model` has no dial any more."""
    _resolvers.pop(model, None)


def native_settings(model: nn.Module, phase: str, num_rows: int, device: torch.device) -> Mapping[str, torch.Tensor]:
    """Method name -> native setting of each row [B] that is in force for `model` where we are, between passes too;
    empty when all run dense."""
    reference = _resolvers.get(model)
    resolve = reference() if reference is not None else None
    return resolve(phase, num_rows, device) if resolve is not None else {}


_pass: ContextVar[Pass | None] = ContextVar("rheostat_pass", default=None)


def current_pass() -> Pass | None:
    """The forward pass in progress, or None when a layer is called on its own."""
    return _pass.get()


def enter_pass(one: Pass) -> None:
    """Announce a forward pass. It stays in force until the next one."""
    _pass.set(one)


@contextmanager
def replay(spending: Spending | None, one: Pass | None) -> Iterator[None]:
    """Put back what was in force when a layer ran, to run it again in backward (maybe in another thread);
    nothing is billed twice."""
    quiet = None if spending is None else replace(spending, meter=Meter(keep_passes=False))
    tokens = _spending.set(quiet), _pass.set(one)
    try:
        yield
    finally:
        _spending.reset(tokens[0])
        _pass.reset(tokens[1])
