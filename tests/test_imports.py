"""Imports go one way, generic code names no concrete method, and importing does no work."""

from __future__ import annotations

import ast
import functools
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rheostat

SOURCE = Path(__file__).parents[1] / "src" / "rheostat"

LAYERS = (
    ("errors",),
    ("columns", "geometry", "config", "folders", "provenance", "processes", "checkpoints", "skeleton"),
    ("terminal",),
    ("report.*",),
    ("digests", "wording"),
    ("cost",),
    ("meter",),
    ("spending", "families", "conversion"),
    ("text", "models", "sampling", "losses", "bases"),
    ("runtime.weights", "kernels.*"),
    ("caches.*", "speculate.drafter"),
    ("methods.base",),
    ("speculate.*",),
    ("methods.*",),
    ("methods",),
    ("dial",),
    ("holding",),
    ("runtime.*", "passes"),
    ("adapted",),
    ("joint",),
    ("decode", "calibration"),
    ("artifact",),
    ("lean",),
    ("exporting",),
    ("train.*",),
    ("adaptation",),
    ("bench.*", "eval.*", "serve.*"),
    ("commands.*",),
    ("cli",),
    ("__main__",),
)
"""Modules below `rheostat`, lowest row first. A module imports from rows below its own, and its own folder.

`x.*` stands for the package `x` and all in it that has no entry of its own. Each `methods/<name>` is a folder
by itself, so a new method needs no row and cannot import another one. `rheostat` itself is above all rows.
"""

LAZY = {("rheostat.models", "load", "rheostat.artifact")}
"""Imports that do go up: (module, function, what it imports when called)."""

GENERIC_METHODS = {"methods", "methods.base", "methods.chain"}
"""What of `methods` is no concrete method."""

FACADE = "rheostat"
"""The package itself: it offers the public names, the concrete methods among them."""

VERSION = "__version__"
"""The one name of the package itself that a module may read."""


class Import(NamedTuple):
    """One import of a module of ours."""

    target: str
    line: int
    function: str
    """The innermost function around it, or empty at module level."""


# -- reading

parse = functools.cache(ast.parse)
"""Every rule looks at the same texts."""


def read_modules() -> dict[str, str]:
    """Module name -> source text, for everything under src/rheostat."""
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return modules


def find_imports(module: str, modules: dict[str, str]) -> list[Import]:
    """The modules of ours that `module` imports anywhere in its text."""
    tree = parse(modules[module])
    found = []
    for node, function in _import_nodes(tree, ""):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: write the absolute name of the module"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            dotted = [name for alias in node.names for name in _used_through(alias, tree)]
        names = [name for name in dotted if name != f"{FACADE}.{VERSION}"]
        targets = [name if name in modules else name.rpartition(".")[0] or name for name in names]
        found += [Import(target, node.lineno, function) for target in dict.fromkeys(targets) if is_ours(target)]
    return found


def is_ours(module: str) -> bool:
    """Whether a module belongs to the package."""
    return f"{module}.".startswith(f"{FACADE}.")


def _import_nodes(node: ast.AST, function: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, function
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _import_nodes(child, child.name if is_function else function)


def _used_through(alias: ast.alias, tree: ast.Module) -> list[str]:
    """What `import alias` stands for: the module; for the package itself, what the text takes from it."""
    if alias.name != FACADE or alias.asname:
        return [alias.name]
    taken = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == FACADE
    ]
    return [f"{FACADE}.{name}" for name in taken] or [FACADE]


def entry_of(module: str) -> str | None:
    """The most specific entry of `LAYERS` that covers a module, or None."""
    name = module.removeprefix(f"{FACADE}.")
    entries = [entry for row in LAYERS for entry in row]
    if name in entries:
        return name
    covering = [e for e in entries if e.endswith(".*") and f"{name}.".startswith(e[:-1])]
    return max(covering, key=len, default=None)


def row_of(module: str) -> int:
    """The number of a module's row; the package itself is above the last."""
    if module == FACADE:
        return len(LAYERS)
    entry = entry_of(module)
    assert entry is not None, f"{module} is in no row of LAYERS in {Path(__file__).name}: add it"
    return next(number for number, row in enumerate(LAYERS) if entry in row)


def folder_of(module: str) -> str:
    """What may import each other freely: the folder, or the single module, below `rheostat`."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["methods"] else 1])


def concrete_methods(modules: dict[str, str]) -> set[str]:
    """The files and folders of `methods` that hold a method, by name."""
    folders = {folder_of(module) for module in modules} - GENERIC_METHODS
    return {folder.removeprefix("methods.") for folder in folders if folder.startswith("methods.")}


def is_generic(module: str) -> bool:
    """Whether a module must not know any concrete method."""
    return module != FACADE and not module.startswith(f"{FACADE}.methods")


# -- the rules, as lists of what breaks them


def upward_imports(modules: dict[str, str]) -> list[str]:
    """Imports that do not go down."""
    wrong = []
    for module in modules:
        for target, line, function in find_imports(module, modules):
            is_down = row_of(target) < row_of(module) or folder_of(target) == folder_of(module)
            if module != FACADE and not is_down and (module, function, target) not in LAZY:
                wrong.append(f"{module}:{line} imports {target}, which is not below it in LAYERS")
    return wrong


def concrete_imports(modules: dict[str, str]) -> list[str]:
    """Imports of concrete methods by generic code."""
    concrete = {f"methods.{name}" for name in concrete_methods(modules)}
    return [
        f"{module}:{one.line} imports {one.target}: generic code goes through rheostat.methods"
        for module in modules
        if is_generic(module)
        for one in find_imports(module, modules)
        if folder_of(one.target) in concrete
    ]


def concrete_mentions(modules: dict[str, str]) -> list[str]:
    """Names of concrete methods in generic code, docstrings and comments left out."""
    names = concrete_methods(modules)
    return [
        f"{module}:{token.start[0]} names {name}: generic code knows no concrete method"
        for module, text in modules.items()
        if is_generic(module)
        for token in _code_tokens(text)
        for name in names
        if name in token.string.lower()
    ]


def _code_tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """All tokens but comments and docstrings (strings alone in a statement, also those under a field)."""
    docs: set[int] = set()
    for node in ast.walk(parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                docs.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT and token.start[0] not in docs:
            yield token


# -- our code keeps them


def test_every_module_has_a_row():
    missing = [module for module in read_modules() if module != FACADE and entry_of(module) is None]
    assert not missing, f"new modules: give each a row of LAYERS in {Path(__file__).name}: {missing}"


def test_every_entry_has_a_module():
    used = {entry_of(module) for module in read_modules()}
    stale = [entry for row in LAYERS for entry in row if entry not in used]
    assert not stale, f"no such modules: take them out of LAYERS in {Path(__file__).name}: {stale}"


def test_imports_go_down():
    assert not upward_imports(read_modules())


def test_declared_lazy_imports_exist():
    modules = read_modules()
    for module, function, target in LAZY:
        found = [(one.function, one.target) for one in find_imports(module, modules)]
        assert (function, target) in found, f"{module}.{function} no longer imports {target}: take it out of LAZY"


def test_generic_code_imports_no_concrete_method():
    modules = read_modules()
    assert concrete_methods(modules)
    assert not concrete_imports(modules)


def test_generic_code_names_no_concrete_method():
    assert not concrete_mentions(read_modules())


# -- and the rules can fail


@pytest.mark.parametrize(
    ("module", "text", "is_allowed"),
    [
        ("rheostat.cost", "from rheostat.errors import bad_setting", True),
        ("rheostat.cost", "from rheostat import errors", True),
        ("rheostat.cost", "import rheostat.adapted", False),
        ("rheostat.cost", "from rheostat import adapted", False),
        ("rheostat.cost", "from rheostat.methods import Method", False),
        ("rheostat.cost", "from rheostat import load", False),
        ("rheostat.cost", "from rheostat import __version__", True),
        ("rheostat.cost", "import rheostat\nx = rheostat.__version__", True),
        ("rheostat.cost", "import rheostat\nx = rheostat.load", False),
        ("rheostat.cost", "import rheostat", False),
        ("rheostat.cost", "import rheostat as r", False),
        ("rheostat.cost", "def f():\n    from rheostat import adapted", False),
        ("rheostat.spending", "from rheostat import families", False),
        ("rheostat.models", "def load():\n    from rheostat import artifact", True),
        ("rheostat.models", "def other():\n    from rheostat import artifact", False),
        ("rheostat.models", "from rheostat import artifact", False),
        ("rheostat.methods.dynamoe.ffn", "from rheostat.methods.dynamoe import routing", True),
        ("rheostat.methods.dynamoe.ffn", "from rheostat.methods.base import Method", True),
        ("rheostat.methods.dynamoe.ffn", "from rheostat.methods.other import Other", False),
        ("rheostat.methods.dynamoe.ffn", "from rheostat.methods import METHODS", False),
        ("rheostat.methods.base", "from rheostat.methods.dynamoe import routing", False),
    ],
)
def test_direction(module: str, text: str, is_allowed: bool):
    names = ("errors", "families", "adapted", "artifact", "methods", "methods.base", "methods.other")
    modules = {f"rheostat.{name}": "" for name in (*names, "methods.dynamoe", "methods.dynamoe.routing")}
    assert bool(upward_imports(modules | {module: text})) is not is_allowed


def test_a_module_without_a_row_is_reported():
    with pytest.raises(AssertionError, match=r"rheostat\.novelty is in no row of LAYERS"):
        upward_imports({"rheostat.novelty": "from rheostat import errors", "rheostat.errors": ""})


@pytest.mark.parametrize(
    ("module", "text", "is_allowed"),
    [
        ("rheostat.dial", '"""Made for DynaMoE."""\nx = 1  # dynamoe', True),
        ("rheostat.dial", 'class Dial:\n    low: float\n    """As DynaMoE needs."""', True),
        ("rheostat.dial", 'name = "dynamoe"', False),
        ("rheostat.dial", 'name = f"the {DynaMoE}"', False),
        ("rheostat.dial", "from rheostat.methods import DynaMoE", False),
        ("rheostat", '__all__ = ["DynaMoE"]', True),
        ("rheostat.methods", "from rheostat.methods.dynamoe import DynaMoE", True),
    ],
)
def test_mentions(module: str, text: str, is_allowed: bool):
    modules = {"rheostat.methods.base": "", "rheostat.methods.dynamoe": "", module: text}
    assert bool(concrete_mentions(modules)) is not is_allowed


def test_import_of_a_concrete_method_is_reported():
    names = ("methods.dynamoe", "methods.dynamoe.routing", "methods.base")
    modules = {f"rheostat.{name}": "" for name in names}
    generic = {"rheostat.dial": "from rheostat.methods import base"}
    concrete = {"rheostat.dial": "from rheostat.methods.dynamoe.routing import Router"}
    assert not concrete_imports(modules | generic)
    assert len(concrete_imports(modules | concrete)) == 1


# -- importing does no work


def run_python(code: str) -> str:
    """Standard output and error of a fresh interpreter, which must succeed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_light():
    heavy = ("accelerate", "datasets", "matplotlib", "numpy", "peft", "rich", "torch", "transformers", "yaml")
    code = f"import sys, rheostat; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_public_names_are_sorted_and_exist():
    names = list(rheostat.__all__)
    assert names == sorted(set(names))
    assert set(names) <= set(dir(rheostat))
    for name in names:
        assert getattr(rheostat, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        rheostat.no_such_name  # noqa: B018


SIDE_EFFECTS = """
import importlib, logging, os, pkgutil, random, sys, threading
import numpy, torch, transformers
from transformers import masking_utils, modeling_utils

def state():
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "random": random.getstate(),
        "numpy random": numpy.random.get_state()[1].tolist(),
        "torch random": torch.get_rng_state().tolist(),
        "torch dtype": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "torch gradients": torch.is_grad_enabled(),
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "attention functions": dict(modeling_utils.ALL_ATTENTION_FUNCTIONS),
        "mask functions": dict(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS),
        "host's forward": transformers.LlamaForCausalLM.forward,
        "host's generate": transformers.LlamaForCausalLM.generate,
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "transformers logging": logging.getLogger("transformers").level,
        "threads": threading.active_count(),
        "excepthook": sys.excepthook,
    }

before = state()
import rheostat
for module in pkgutil.walk_packages(rheostat.__path__, "rheostat."):
    importlib.import_module(module.name)
after = state()
print([name for name in before if before[name] != after[name]])
"""


def test_imports_have_no_side_effects():
    """Also that nothing is printed, and that no module needs an optional package to be imported."""
    assert run_python(SIDE_EFFECTS).strip() == "[]"
