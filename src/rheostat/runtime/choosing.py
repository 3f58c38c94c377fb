"""Which runtime runs a model: ours, or `transformers`."""

from __future__ import annotations

import logging

from rheostat.errors import SettingError, bad_setting
from rheostat.runtime.building import Unsupported

logger = logging.getLogger(__name__)

RUNTIMES = ("auto", "native", "stock")
"""`auto` takes ours where it can; `native` insists on it; `stock` is `transformers`."""

KNOWN_STAGES = frozenset({"weights", "width", "training", "analysis", "prefill"})
"""Stages of methods that the runtime can live with: their modules say what to compute, or a prompt is read by the
method itself and we go on from its cache."""

FORMED_STAGES = frozenset({"cache", "decode"})
"""Stages that it can live with where the method has a form of them that the runtime keeps (`Method.cache_form`,
`Method.draft_form`)."""

OWN_GENERATE = frozenset({"prefill"})
"""Of those, the ones that `generate` of `transformers` has no place for."""


def check_runtime(runtime: str) -> str:
    """The setting, if there is such a one.

    Raises:
        SettingError: there is not.
    """
    if runtime not in RUNTIMES:
        raise bad_setting("runtime", runtime, f"one of {', '.join(RUNTIMES)}")
    return runtime


def refuse(runtime: str, reason: Unsupported) -> None:
    """Say in the log why `transformers` runs; an error where our runtime was insisted on.

    Raises:
        SettingError: it was.
    """
    if runtime == "native":
        raise SettingError(
            f"runtime=native: must be auto or stock here; the runtime does not support {reason}"
        ) from None
    logger.debug("transformers runs this: the runtime does not support %s", reason)
