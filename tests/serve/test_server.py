"""Binding, and the signals. That answers in flight are finished is in test_faults.py, with a process of its own."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from rheostat.errors import SettingError
from rheostat.serve.server import Server, listen


def test_an_address_that_is_taken_or_not_ours_is_one_clear_line():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=f"host='127.0.0.1', port={port}: cannot listen there"):
            listen("127.0.0.1", port)
    with pytest.raises(SettingError, match="cannot listen there"):
        listen("no.such.host.invalid", 0)


def test_the_first_signal_drains_and_the_second_ends():
    drained: list[int] = []
    engine: Any = SimpleNamespace(drain=lambda: drained.append(1))
    server = Server(lambda: None, engine, drain_seconds=0.2)
    assert server.config.timeout_graceful_shutdown == 1
    server.handle_exit(signal.SIGINT, None)
    assert (drained, server.should_exit, server.force_exit) == ([1], True, False)
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit
