"""`rheostat serve` as far as it gets without serving; tests/serve has the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rheostat.commands import load
from rheostat.commands.serve import Config, build
from rheostat.errors import SettingError


def test_without_the_extra_it_is_one_clear_line(refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'rheostat[serve]'" in refused("serve", "model")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "70000"), "port=70000: must be from 0 to 65535"),
        (("--host", "203.0.113.1"), "cannot listen there"),
        (("--request-seconds", "0"), "request_seconds=0.0: must be"),
        (("--log-level", "loud"), "log_level='loud': must be"),
        (("--name", "a@b"), "name='a@b': must be without @"),
        (("--max-body-bytes", "0"), "max_body_bytes=0: must be 1 or more"),
    ],
)
def test_settings_are_checked_before_the_model_is_read(refused, flags: tuple[str, ...], message: str):
    assert message in refused("serve", "no-such-model", "--port", "0", *flags)


def test_the_server_is_built_from_its_settings(dial_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RHEOSTAT_API_KEY", "secret")
    config = Config(model=str(dial_folder), rows=3, adaptive=True, compute=0.9)
    server, name = build(config, load(config.model, config))
    assert name == dial_folder.name
    assert server.engine.scheduler.limits.rows == 3
    assert server.engine.adaptive is not None
    assert server.engine.backend.name == "native fp32"
    assert not server.engine.is_alive


def test_a_default_outside_the_dial_and_a_report_that_is_not_there(dial_folder: Path, tmp_path: Path):
    loaded = load(str(dial_folder), Config(model=str(dial_folder)))
    with pytest.raises(SettingError, match="compute=0.1: must be between"):
        build(Config(model=str(dial_folder), compute=0.1), loaded)
    with pytest.raises(SettingError, match="report=.*must be a report.json"):
        build(Config(model=str(dial_folder), report=str(tmp_path)), loaded)
