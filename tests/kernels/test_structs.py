"""Structures that Python fills and C++ reads: the same fields at the same places, and what does not fit is refused."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.kernels import build, pack, structs
from rheostat.kernels.packed import CMatrix

try:
    COMPILER = build.find_compiler()
except SettingError:
    COMPILER = ()

STRUCTURES = [
    CMatrix,
    *(one for one in vars(structs).values() if isinstance(one, type) and issubclass(one, ctypes.Structure)),
]


class Drifted(ctypes.Structure):
    """A router with two fields in the wrong order."""

    _fields_ = (structs.CRouter._fields_[1], structs.CRouter._fields_[0], *structs.CRouter._fields_[2:])


def assertions(structure: type[ctypes.Structure], name: str, mark: str = "") -> list[str]:
    """C++ that compiles if the native code's structure `name` is laid out alike."""
    places = [
        f"static_assert(offsetof({name}, {field}) == {getattr(structure, field).offset} && "
        f'sizeof({name}::{field}) == {getattr(structure, field).size}, "{mark}{name}::{field}");'
        for field, _ in structure._fields_
    ]
    return [*places, f'static_assert(sizeof({name}) == {ctypes.sizeof(structure)}, "{mark}{name}");']


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the compiler finds wrong with all structures, and with one that drifted: one run for both."""
    if not COMPILER:
        pytest.skip("no compiler")
    lines = ["#include <cstddef>", f'#include "{build.NATIVE / "kernels.cpp"}"']
    for structure in STRUCTURES:
        lines += assertions(structure, structure.__name__.removeprefix("C"))
    lines += assertions(Drifted, "Router", "drifted ")
    source = tmp_path_factory.mktemp("layout") / "layout.cpp"
    source.write_text("\n".join(lines))
    command = [*COMPILER, "-std=c++17", "-fsyntax-only", "-w", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return [line for line in done.stderr.splitlines() if "error" in line]


def test_every_structure_is_laid_out_as_in_the_native_code(errors):
    assert len(STRUCTURES) > 10
    assert not [line for line in errors if "drifted" not in line]


def test_a_structure_that_drifted_is_found(errors):
    assert any("drifted Router::inner" in line for line in errors)


# -- filling them


def test_what_a_structure_points_at_is_kept_as_float32():
    keep = structs.Keep()
    assert keep.floats(None) is None
    steps = torch.arange(6, dtype=torch.float16)[::2]
    address = keep.floats(steps)
    assert list((ctypes.c_float * 3).from_address(address)) == [0, 2, 4]
    array = keep.array(ctypes.c_int32, [7, 8])
    assert list((ctypes.c_int32 * 2).from_address(array)) == [7, 8]
    assert len(keep.alive) == 2, "else the memory would be free while native code reads it"


def ffn(sizes=(16, 32), is_own=False, format="fp32", width=24, biases=None):
    """Arguments of `make_ffn`."""
    gate, up = (pack(torch.randn(sizes[-1], width), format) for _ in range(2))
    downs = [pack(torch.randn(width, size), format) for size in (sizes if is_own else sizes[-1:])]
    return {
        "gate": gate,
        "up": up,
        "downs": downs,
        "biases": [None] * len(downs) if biases is None else biases,
        "sizes": sizes,
        "activation": "silu",
    }


@pytest.mark.parametrize("is_own", [False, True])
def test_an_ffn_says_what_it_was_given(is_own):
    keep = structs.Keep()
    made = structs.make_ffn(keep, **ffn(is_own=is_own))
    assert (made.num_experts, made.num_downs, made.activation) == (2, 1 + is_own, structs.ACTIVATIONS["silu"])
    assert list((ctypes.c_int32 * 2).from_address(made.sizes)) == [16, 32]
    downs = (CMatrix * made.num_downs).from_address(made.downs)
    assert [one.cols for one in downs] == ([16, 32] if is_own else [32])
    assert all(one.rows == 24 for one in downs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("activation", {"activation": "tanh"}),
        ("sizes", {"sizes": ()}),
        ("sizes", {"sizes": (32, 16)}),
        ("sizes", {"sizes": (16, 16, 32)}),
        ("sizes", {"sizes": (0, 32)}),
        ("gate, up", {"sizes": (16, 48)}),
        ("gate, up", {"up": pack(torch.randn(32, 24), "bf16")}),
        ("downs", {"downs": []}),
        ("downs", {"biases": []}),
        ("downs", {"downs": [pack(torch.randn(24, 16), "fp32")]}),
        ("biases", {"biases": [torch.zeros(23)]}),
    ],
)
def test_an_ffn_that_does_not_fit_together_is_refused(name, change):
    with pytest.raises(SettingError, match=f"^{name}="):
        structs.make_ffn(structs.Keep(), **(ffn() | change))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((9, 2, 64, torch.float32), "heads="),
        ((9, 0, 64, torch.float32), "heads="),
        ((9, 3, 0, torch.float32), "head_dim=0"),
        ((9, 3, structs.MAX_HEAD_DIM + 1, torch.float32), "head_dim="),
        ((9, 3, 64, torch.float64), "cache dtype="),
    ],
)
def test_attention_that_cannot_be_read_is_refused(heads, message):
    structs.check_attention(9, 3, structs.MAX_HEAD_DIM, torch.bfloat16)
    with pytest.raises(SettingError, match=message):
        structs.check_attention(*heads)


def test_a_cache_without_planes_has_no_structure():
    class Cache:
        body = None

    assert structs.planes_of(Cache()) is None
