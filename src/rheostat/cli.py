"""The command line: a table of verbs. A verb's module is imported only when the verb is called.

Such a module has a docstring (which is its help), a frozen dataclass `Config` (which is its flags) and
`run(config)`, which prints for people and returns the figures for machines. Where settings hold others,
`more_help()` lists those.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from types import ModuleType
from typing import NoReturn

import rheostat
from rheostat.config import add_flags, resolve
from rheostat.errors import SettingError, bad_setting

VERBS = {
    "adapt": ("rheostat.commands.adapt", "turn a dense model into one with a dial"),
    "generate": ("rheostat.commands.generate", "write an answer at a chosen compute, and show what it cost"),
    "eval": ("rheostat.commands.eval", "measure quality against compute"),
    "bench": ("rheostat.commands.bench", "measure time and memory, against stock and against the machine"),
    "serve": ("rheostat.commands.serve", "answer over HTTP, with the dial in each request and a page to see it"),
    "report": ("rheostat.commands.report", "compare measured models in one page"),
    "export": ("rheostat.commands.export", "freeze the dial into a plain checkpoint"),
    "info": ("rheostat.commands.info", "show a model's sizes, methods, dial and origin"),
}
"""Verb -> the module that does it, and one line of help."""

HELP = """\
usage: rheostat COMMAND MODEL [settings]

One language model, one checkpoint, and a dial for its compute.

commands:
{verbs}

MODEL is a bundled name (smollm2-135m), a Hub id, a checkpoint folder, a .gguf file, or a folder from adapt.

example:
  rheostat adapt smollm2-135m --out smol-dial
  rheostat generate smol-dial "Write one sentence about rivers." --compute 1.0,0.7
  rheostat eval smol-dial --out figures

`rheostat COMMAND --help` explains a command and lists its settings.
"""


class Parser(argparse.ArgumentParser):
    """Errors are `SettingError`s, and what `module.more_help` says is fetched only when help is asked for."""

    def __init__(self, verb: str, module: ModuleType) -> None:
        about, _, example = (module.__doc__ or "").partition("\n\nExample:\n")
        super().__init__(
            prog=f"rheostat {verb}",
            description=about,
            epilog=f"example:\n{example.rstrip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.module = module

    def format_help(self) -> str:
        """The help text."""
        more = getattr(self.module, "more_help", None)
        return super().format_help() + (f"\n{more()}" if more else "")

    def error(self, message: str) -> NoReturn:
        """Report what the parser found."""
        raise SettingError(message)


def run(arguments: list[str]) -> int:
    """Do what the arguments say; returns the exit status.

    Raises:
        SettingError: an argument is not allowed.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
        print(HELP.format(verbs=verbs), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"rheostat {rheostat.__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise bad_setting("command", verb, f"one of {', '.join(VERBS)} (see rheostat --help)")
    module = import_module(VERBS[verb][0])
    parser = Parser(verb, module)
    add_flags(parser, module.Config)
    # Intermixed, so that the model and the prompt may stand on both sides of a flag.
    config = resolve(module.Config, parser.parse_intermixed_args(arguments[1:]))
    figures = module.run(config)
    if config.json:
        from rheostat.report import to_json

        print(to_json(figures), flush=True)
    return 0
