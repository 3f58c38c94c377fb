"""Each module has a test file at the mirrored place: `src/rheostat/a/b.py` and `tests/a/test_b.py`."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "rheostat"

ELSEWHERE = {
    "__init__.py": "tests/test_imports.py",
    "bench/llama.py": "tests/bench/test_sides.py",
    "commands/__init__.py": "tests/commands",
    "errors.py": "tests/test_config.py",
    "eval/sandbox_child.py": "tests/eval/test_sandbox.py",
    "eval/sandbox_guard.py": "tests/eval/test_sandbox.py",
    "eval/tasks/fields.py": "tests/eval/tasks",
    "kernels/__init__.py": "tests/kernels/test_native.py",
    "kernels/plain.py": "tests/kernels/test_native.py",
    "kernels/triton/ffn_few.py": "tests/kernels/triton/test_ffn.py",
    "kernels/triton/ffn_launch.py": "tests/kernels/triton/test_ffn.py",
    "kernels/triton/ffn_many.py": "tests/kernels/triton/test_ffn.py",
    "kernels/triton/plain.py": "tests/kernels/triton/test_planes.py",
    "methods/__init__.py": "tests/test_contract.py",
    "methods/kv_prediction/predictor.py": "tests/methods/kv_prediction",
    "methods/kv_prediction/prefix.py": "tests/methods/kv_prediction",
    "methods/kv_prediction/watching.py": "tests/methods/kv_prediction",
    "runtime/planes.py": "tests/kernels/test_verify.py",
    "runtime/weights.py": "tests/runtime/test_packing.py",
    "speculate/bound.py": "tests/speculate",
    "speculate/drafter.py": "tests/speculate",
    "speculate/drafting.py": "tests/speculate",
    "speculate/stock.py": "tests/speculate",
}
"""Modules without a test file of their own -> where they are tested. Only ever made shorter: a new module brings its
own test file."""


def without_mirror() -> set[str]:
    """Modules, less those that hold nothing to test, that have no test file at the mirrored place."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE)
        name = "test_init.py" if path.stem == "__init__" else f"test_{path.name}"
        has_code = any(line.startswith(("def ", "class ", "@")) for line in path.read_text().splitlines())
        if has_code and path.stem != "__main__" and not (TESTS / place.parent / name).is_file():
            found.add(str(place))
    return found


def test_every_module_has_a_test_file_of_its_own():
    new = without_mirror() - ELSEWHERE.keys()
    assert not new, f"each needs tests at the mirrored place: {sorted(new)}"


def test_exceptions_are_still_needed():
    stale = ELSEWHERE.keys() - without_mirror()
    assert not stale, f"take them out of ELSEWHERE in {Path(__file__).name}: {sorted(stale)}"
    missing = {place for place in ELSEWHERE.values() if not (TESTS.parent / place).exists()}
    assert not missing, f"ELSEWHERE names tests that are not there: {sorted(missing)}"
