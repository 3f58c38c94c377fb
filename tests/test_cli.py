"""Help, statuses, and lines for what goes wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import rheostat
from rheostat import cli, terminal
from rheostat.__main__ import main
from rheostat.commands import info
from rheostat.errors import SettingError
from rheostat.folders import NOTICE


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    """Makes `rheostat info` do something else."""

    def break_with(error: BaseException) -> None:
        def run(_: object) -> dict:
            raise error

        monkeypatch.setattr(info, "run", run)

    return break_with


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, (_, text) in cli.VERBS.items():
        assert verb in out
        assert text in out
    assert main([]) == 2


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_teaches(verb: str, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example:\n  rheostat {verb}" in out
    assert "--json" in out
    assert "Example" not in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rheostat {rheostat.__version__}\n"


def test_an_unknown_verb(capsys):
    assert main(["evla"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "rheostat: error: command='evla': must be one of adapt, generate, eval, bench, serve, report, export, info"
    )
    assert err.count("\n") == 1


def test_positionals_may_stand_around_flags(monkeypatch: pytest.MonkeyPatch):
    from rheostat.commands import generate

    seen = []
    monkeypatch.setattr(generate, "run", lambda config: seen.append((config.model, config.prompt)) or {})
    assert main(["generate", "m", "--compute", "0.7", "a prompt"]) == 0
    assert main(["generate", "--seed", "1", "m", "a prompt"]) == 0
    assert seen == [("m", "a prompt")] * 2


def test_flags_are_not_guessed(capsys):
    assert main(["info", "m", "--see", "1"]) == 2
    assert "unrecognized arguments: --see" in capsys.readouterr().err


def test_help_is_light():
    heavy = ("matplotlib", "rich", "torch", "transformers")
    for arguments in (["--help"], ["generate", "--help"]):
        code = (
            f"import sys; from rheostat.__main__ import main; main({arguments!r}); "
            f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
        assert done.stderr.strip() == "[]"


def test_our_own_faults(broken, capsys, monkeypatch: pytest.MonkeyPatch):
    broken(RuntimeError("two\nlines"))
    monkeypatch.delenv("RHEOSTAT_TRACEBACK", raising=False)
    assert main(["info", "m"]) == 1
    wanted = "rheostat: internal error: RuntimeError: two lines (set RHEOSTAT_TRACEBACK=1 for the traceback)\n"
    assert capsys.readouterr().err == wanted
    monkeypatch.setenv("RHEOSTAT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["info", "m"])


def test_interrupts(broken, capsys):
    broken(KeyboardInterrupt())
    assert main(["info", "m"]) == 130
    assert capsys.readouterr().err == "rheostat: interrupted\n"


def test_a_reader_that_has_gone(broken, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    broken(BrokenPipeError())
    assert main(["info", "m"]) == 141
    sys.stdout.close()


def test_a_reader_of_tables_that_has_gone(monkeypatch: pytest.MonkeyPatch):
    read, written = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(written, "w"))  # noqa: SIM115
    monkeypatch.setattr(info, "run", lambda _: terminal.console().print("a table"))
    gone = sys.stdout
    assert main(["info", "m"]) == 141
    sys.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        gone.close()


def test_streams_that_are_closed(broken, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    broken(SettingError("x=1: must be 2"))
    assert main(["info", "m"]) == 2
    assert main(["--help"]) == 0
    for stream in (sys.stdout, sys.stderr):
        stream.close()


def test_sigterm_ends_a_command_as_an_error_does(monkeypatch: pytest.MonkeyPatch):
    left = []

    def run(_: object) -> dict:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            left.append("swept")

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        monkeypatch.setattr(info, "run", run)
        assert main(["info", "m"]) == 143
        assert left == ["swept"]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_we_log_is_shown_and_what_others_warn_of_is_not(capsys, monkeypatch: pytest.MonkeyPatch):
    def run(_: object) -> dict:
        logging.getLogger("rheostat.somewhere").warning("seen %d times", 2)
        logging.getLogger("rheostat.somewhere").info("nothing")
        logging.getLogger("rheostat.somewhere").log(NOTICE, "brewing, once")
        warnings.warn("chatter")
        return {}

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(info, "run", run)
    assert main(["info", "m"]) == 0
    assert capsys.readouterr().err == "rheostat: warning: seen 2 times\nrheostat: brewing, once\n"
    assert logging.getLogger("rheostat").level == logging.NOTSET
    assert not [h for h in logging.getLogger("rheostat").handlers if type(h).__module__ == "rheostat.__main__"]


def test_json_is_the_last_line_and_has_no_odd_numbers(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(info, "run", lambda _: print("table") or {"a": [float("inf"), 1.5], "b": float("nan")})
    assert main(["info", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"a": [None, 1.5], "b": None}
    assert main(["info", "m"]) == 0
    assert capsys.readouterr().out == "table\n"


def test_python_m_rheostat():
    command = [sys.executable, "-m", "rheostat", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == (f"rheostat {rheostat.__version__}\n", "")


def test_loading_is_quiet(tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]):
    """Standard error stays empty: no bars from the libraries below."""
    assert main(["info", str(tiny_model_folder), "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert json.loads(out.splitlines()[-1])["geometry"]["num_layers"] == 2


@pytest.mark.slow  # a fresh interpreter imports all of `transformers`, seven seconds of a processor
def test_a_real_process_is_quiet(tiny_model_folder: Path):
    """No advice from the libraries below either, when they are first imported."""
    command = [sys.executable, "-m", "rheostat", "info", str(tiny_model_folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["provenance"]["command"].startswith("rheostat info ")
