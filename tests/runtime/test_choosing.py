"""Who runs: a bad name is refused, and being refused is an error only where our runtime was insisted on."""

from __future__ import annotations

import logging

import pytest

from rheostat.errors import SettingError
from rheostat.runtime import choosing
from rheostat.runtime.building import Unsupported

REASON = Unsupported("the family gemma2")


def test_names():
    assert [choosing.check_runtime(name) for name in choosing.RUNTIMES] == ["auto", "native", "stock"]
    for name in ("Native", "", "transformers"):
        with pytest.raises(SettingError, match=f"runtime='{name}': must be one of auto, native, stock"):
            choosing.check_runtime(name)


def test_only_who_insists_gets_an_error(caplog):
    caplog.set_level(logging.DEBUG, "rheostat")
    choosing.refuse("auto", REASON)
    assert "does not support the family gemma2" in caplog.text
    with pytest.raises(SettingError, match="runtime=native: must be auto or stock here.*the family gemma2") as caught:
        choosing.refuse("native", REASON)
    assert "\n" not in str(caught.value)


def test_stages_are_dealt_with_in_one_way():
    assert not choosing.KNOWN_STAGES & choosing.FORMED_STAGES
    assert choosing.OWN_GENERATE <= choosing.KNOWN_STAGES
