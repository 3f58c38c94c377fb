"""One JSON object a line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from rheostat.serve.logs import set_up

NAMES = ("rheostat", "uvicorn")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged; the loggers are as before in the end."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    out = io.StringIO()
    set_up("info", out)
    yield out
    for one, (handlers, propagates, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagates
        one.setLevel(level)


def test_each_record_is_one_line_of_json_with_its_fields(stream: io.StringIO):
    logging.getLogger("rheostat.serve.access").info("request", extra={"fields": {"status": 200, "path": "/v1\nx"}})
    logging.getLogger("uvicorn.error").warning("two\nlines")
    logging.getLogger("rheostat").debug("too fine")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(one["level"], one["message"]) for one in lines] == [("info", "request"), ("warning", "two\nlines")]
    assert (lines[0]["status"], lines[0]["path"]) == (200, "/v1\nx")
    assert lines[0]["time"].endswith("+00:00")


def test_an_exception_comes_with_its_traceback(stream: io.StringIO):
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("rheostat").exception("broken")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: why" in json.loads(line)["exception"]
