"""Rheostat: one pretrained language model, one checkpoint, and a dial for its compute.

    import rheostat

    model, tokenizer = rheostat.load("smollm2-135m")
    adapted = rheostat.adapt(model, tokenizer, rheostat.DynaMoE(num_experts=4), "builtin:calibration")
    out = adapted.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64, compute=0.7)

Names are imported when they are first used, so `import rheostat` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Adapted": "rheostat.adapted",
    "Chain": "rheostat.methods",
    "Cost": "rheostat.cost",
    "Dial": "rheostat.dial",
    "DynaMoE": "rheostat.methods",
    "Geometry": "rheostat.geometry",
    "KVPrediction": "rheostat.methods",
    "Meter": "rheostat.meter",
    "Method": "rheostat.methods",
    "QuantSpec": "rheostat.methods",
    "SettingError": "rheostat.errors",
    "adapt": "rheostat.adaptation",
    "export": "rheostat.exporting",
    "load": "rheostat.models",
    "save": "rheostat.artifact",
    "spend": "rheostat.spending",
    "stream": "rheostat.decode",
}

__all__ = [
    "Adapted",
    "Chain",
    "Cost",
    "Dial",
    "DynaMoE",
    "Geometry",
    "KVPrediction",
    "Meter",
    "Method",
    "QuantSpec",
    "SettingError",
    "adapt",
    "export",
    "load",
    "save",
    "spend",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rheostat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
