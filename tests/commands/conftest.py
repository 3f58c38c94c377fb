"""Commands as they are called, on a tiny model: adapted once for all tests, and called in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rheostat import kernels
from rheostat.__main__ import main

TINY_FIT = ("--fit", "windows=8", "--fit", "length=64", "--fit", "dial_windows=4")
TINY_METHOD = ("--set", "tile=4", "--set", "router_width=8", "--set", "router_steps=40")


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def figures(self) -> dict[str, Any]:
        """The JSON on the last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


Rheostat = Callable[..., Done]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Commands say that kernels are compiled, where that has still to be done."""
    kernels.library()


@pytest.fixture
def rheostat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rheostat:
    """Calls the command line."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        line = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["rheostat", *line])  # what provenance reports
        status = main(line)
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def refused(rheostat: Rheostat) -> Callable[..., str]:
    """Calls the command line, which must refuse: status 2 and one line. Returns the line."""

    def call(*arguments: object) -> str:
        done = rheostat(*arguments)
        assert done.status == 2, done
        assert done.err.startswith("rheostat: error: ")
        assert done.err.count("\n") == 1
        return done.err

    return call


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a report are laid out and written but not painted, which takes seconds: for tests of what else it
    holds."""
    monkeypatch.setattr("rheostat.report.writing.png", lambda figure: b"")
    monkeypatch.setattr("rheostat.report.page.svg", lambda figure, name, label: f"<svg id={name!r}></svg>")


@pytest.fixture(scope="session")
def adapt_arguments(tiny_model_folder: Path, tiny_text: Path) -> list[str]:
    """An `adapt` of the tiny model that takes a moment; --out is missing."""
    texts = ("--data", str(tiny_text), "--held-out", str(tiny_text))
    return ["adapt", str(tiny_model_folder), *texts, *TINY_METHOD, *TINY_FIT]


@pytest.fixture(scope="session")
def dial_folder(tmp_path_factory: pytest.TempPathFactory, adapt_arguments: list[str]) -> Path:
    """The tiny model, adapted. Tests must not write into it."""
    out = tmp_path_factory.mktemp("adapted") / "dial"
    assert main([*adapt_arguments, "--out", str(out)]) == 0
    return out
