"""The methods by name. A new one is a file (or folder) here and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rheostat.errors import bad_setting
from rheostat.methods.base import Method
from rheostat.methods.chain import Chain
from rheostat.methods.dynamoe import DynaMoE
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.methods.quantspec import QuantSpec

METHODS: dict[str, type[Method]] = {
    "dense": Method,
    "dynamoe": DynaMoE,
    "quantspec": QuantSpec,
    "kv_prediction": KVPrediction,
}


def make_method(settings: Mapping[str, Any]) -> Method:
    """A method from plain types, as `Method.to_dict` writes them.

    Raises:
        SettingError: the name or a setting is unknown, or a value is not allowed.
    """
    name = settings.get("name")
    if name == Chain.name:
        if unknown := sorted(set(settings) - {"name", "methods"}):
            raise bad_setting(f"chain.{unknown[0]}", settings[unknown[0]], "one of the settings methods")
        return Chain([make_method(one) for one in settings.get("methods", ())])
    if name not in METHODS:
        raise bad_setting("method", name, f"one of {', '.join(METHODS)}")
    return METHODS[name].from_dict(settings)


def kept_method(settings: Mapping[str, Any]) -> Method:
    """A method as an artifact keeps it. Settings that came later than the artifact are what they were in effect then
    (`Method.before`), not what they are by default now.

    Raises:
        SettingError: as `make_method`.
    """
    return make_method(_as_meant(settings))


def _as_meant(settings: Mapping[str, Any]) -> dict[str, Any]:
    if settings.get("name") == Chain.name:
        return dict(settings) | {"methods": [_as_meant(one) for one in settings.get("methods", ())]}
    return dict(METHODS.get(settings.get("name", ""), Method).before) | dict(settings)
