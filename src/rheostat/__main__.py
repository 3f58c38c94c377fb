"""`python -m rheostat`, and the script `rheostat`: what goes wrong becomes one line and an exit status."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType

from rheostat import cli, processes
from rheostat.errors import SettingError
from rheostat.folders import NOTICE

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Keeps the host library's own chatter off the terminal; what the user has set wins."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 2 for what the user can mend, 130 after an interrupt, 143 after SIGTERM, 1 for our own
        faults.
    """
    _open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with _terminable(), _own_words(), _one_voice():
            status = cli.run(arguments)
            sys.stdout.flush()  # here, where a reader that has gone is no fault
            return status
    except SystemExit as request:  # argparse ends --help with it, SIGTERM a command
        return int(request.code or 0)
    except SettingError as error:
        return _say(f"error: {_one_line(error)}", 2)
    except KeyboardInterrupt as interrupt:
        advice = f"; {interrupt}" if str(interrupt) else ""
        return _say(f"interrupted{advice}", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the interpreter flushes it when it ends)
        return 141
    except Exception as error:
        if os.environ.get("RHEOSTAT_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {_one_line(error)}"
        return _say(f"internal error: {what} (set RHEOSTAT_TRACEBACK=1 for the traceback)", 1)


def _say(line: str, status: int) -> int:
    sys.stdout.flush()
    print(f"rheostat: {line}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _open_streams() -> None:
    """Streams that the caller closed (`>&-`) are None; what is written to them goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for as long as the process lives)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as an error does: temporary folders and child processes end with it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Lines(logging.Handler):
    """Log records as lines of ours, on standard error as it is at that moment (progress bars replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"rheostat: {level}{record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def _own_words() -> Iterator[None]:
    """What we log is shown; warnings of the libraries below are not, unless Python was asked for them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logger, handler = logging.getLogger("rheostat"), _Lines(NOTICE)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), NOTICE))
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes, only the main one prints results and progress. Errors come from all of them."""
    if processes.is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


if __name__ == "__main__":
    sys.exit(main())
