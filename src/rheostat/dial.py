"""`Dial`: from `compute`, a fraction of the dense model's FLOPs a token, to the methods' own settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rheostat.errors import SettingError, bad_setting

ROUNDING = 1e-6
"""A `compute` this little below the range is in it: float32 tensors and printed tables round."""


@dataclass(frozen=True, kw_only=True)
class Dial:
    """A calibration table: at each point, the `compute` that was measured and the native setting that gave it.

    The first point is `compute=1.0` with the neutral settings; `compute` falls from point to point.
    """

    compute: tuple[float, ...] = (1.0,)
    settings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Method name -> native setting at each point."""
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    """What the table was measured on: source, windows, tokens."""
    profile: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    """Method name -> mean FFN width of each layer, as a share of the full one, at each point; where it is known."""

    def __post_init__(self) -> None:
        falls = all(a > b for a, b in zip(self.compute, self.compute[1:], strict=False))
        if not self.compute or self.compute[0] != 1.0 or not falls or self.compute[-1] <= 0:
            raise SettingError("dial: compute must start at 1.0 and fall")
        for name, values in self.settings.items():
            if len(values) != len(self.compute) or any(not math.isfinite(v) or v < 0 for v in values):
                raise SettingError(f"dial: {name} must have one finite, non-negative setting for each compute")
        for name, rows in self.profile.items():
            is_square = len({len(row) for row in rows}) == 1
            if len(rows) != len(self.compute) or not is_square or any(not 0 <= v <= 1 for row in rows for v in row):
                raise SettingError(f"dial: the profile of {name} must have one row of shares for each compute")

    @property
    def low(self) -> float:
        """The smallest `compute` that can be asked for."""
        return self.compute[-1]

    def native(self, compute: float) -> dict[str, float]:
        """The native settings for one `compute`, between two points by interpolation of the setting's logarithm.

        Raises:
            SettingError: outside the reachable range.
        """
        if not self.low - ROUNDING <= compute <= 1:
            raise bad_setting("compute", compute, _allowed(self.low))
        if compute == 1.0:
            return {name: values[0] for name, values in self.settings.items()}
        i = next((k for k, c in enumerate(self.compute) if c <= compute), len(self.compute) - 1)
        high, low = self.compute[i - 1], self.compute[i]
        share = min(1.0, (high - compute) / (high - low))
        return {name: _between(values[i - 1], values[i], share) for name, values in self.settings.items()}

    def rows(self, computes: Sequence[float], device: torch.device) -> dict[str, torch.Tensor]:
        """The native settings [B] of rows with these `compute` values."""
        by_value = {value: self.native(value) for value in set(computes)}
        return {
            name: torch.tensor([by_value[value][name] for value in computes], device=device) for name in self.settings
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "compute": list(self.compute),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "measured_on": dict(self.measured_on),
        } | (
            {"profile": {name: [list(row) for row in rows] for name, rows in self.profile.items()}}
            if self.profile
            else {}
        )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Dial:
        """The inverse of `to_dict`.

        Raises:
            SettingError: the table is not one.
        """
        try:
            settings = {name: tuple(map(float, values)) for name, values in table["settings"].items()}
            profile = {
                name: tuple(tuple(map(float, row)) for row in rows) for name, rows in table.get("profile", {}).items()
            }
            return cls(
                compute=tuple(map(float, table["compute"])),
                settings=settings,
                measured_on=table.get("measured_on", {}),
                profile=profile,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SettingError(f"dial: the saved table cannot be read ({error})") from None


def _allowed(low: float) -> str:
    if low == 1.0:
        return "1.0: this model has no calibrated dial (adapt it first)"
    return f"between {math.ceil(low * 1000) / 1000:.3f} and 1, the range this model's dial reaches"


def _between(a: float, b: float, share: float) -> float:
    """Geometric interpolation, linear where one end is 0; between equals exactly that, for methods with steps."""
    if a == b:
        return a
    return a + (b - a) * share if a <= 0 or b <= 0 else math.exp(math.log(a) * (1 - share) + math.log(b) * share)
