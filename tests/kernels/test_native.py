"""The native kernels against their plain twins, over random shapes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat import kernels
from rheostat.errors import SettingError
from rheostat.kernels import FORMATS as NAMES
from rheostat.kernels import decode_attention, few_rows, nested_ffn, pack, plain
from rheostat.kernels.structs import ACTIVATIONS
from tests.kernels.cases import FORMATS, TOLERANCE, random_matrix

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler")

CASE = st.sampled_from(FORMATS)
SEED = st.integers(0, 999)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- products of few rows


@settings(deadline=None, max_examples=50)
@given(CASE, st.integers(0, 33), st.integers(0, 80), st.integers(1, 300), st.booleans(), st.data(), SEED)
def test_few_rows(case, num_rows, num_outputs, num_inputs, has_bias, data, seed):
    g = seeded(seed)
    w = random_matrix(num_outputs, num_inputs, *case, g)
    start = data.draw(st.integers(0, num_outputs))
    stop = data.draw(st.integers(start, num_outputs))
    bias = torch.randn(stop - start, generator=g) if has_bias else None
    x = torch.randn(num_rows, num_inputs, generator=g)
    y, wanted = few_rows(x, w, start, stop, bias), plain.few_rows(x, w, start, stop, bias)
    assert y.shape == wanted.shape
    # Against the size of x: a short sum may cancel to nearly zero, the rounding of its terms does not.
    assert float((y - wanted).norm()) <= TOLERANCE[case[0]] * max(float(x.norm()) * num_outputs**0.5, 1e-6)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_each_weight_is_where_it_belongs(format, group):
    """One-hot rows survive every rounding, so the product is a column, nearly to the last bit."""
    w = random_matrix(45, 150, format, group, seeded(0))
    assert torch.allclose(few_rows(torch.eye(150), w), w.unpack().T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", NAMES)
def test_a_row_does_not_depend_on_its_neighbours(format):
    w = random_matrix(40, 130, format, 32, seeded(1))
    x = torch.randn(9, 130, generator=seeded(2))
    x[4] *= 1000
    one_by_one = torch.cat([few_rows(row[None], w) for row in x])
    assert torch.allclose(few_rows(x, w), one_by_one, rtol=1e-5, atol=1e-5)


def test_strided_input_and_given_output():
    w = random_matrix(20, 64, "fp32", 0, seeded(0))
    wide = torch.randn(3, 128, generator=seeded(1))
    wanted = plain.few_rows(wide[:, ::2], w)
    assert torch.allclose(few_rows(wide[:, ::2], w), wanted, atol=1e-5)
    assert torch.allclose(few_rows(wide.T[::2].T, w), wanted, atol=1e-5)
    out = torch.empty(3, 20)
    assert few_rows(wide[:, ::2], w, out=out) is out
    assert torch.allclose(out, wanted, atol=1e-5)


def test_what_does_not_fit_is_refused():
    w = pack(torch.randn(20, 64), "int8")
    x = torch.randn(2, 64)
    for bad in (x.double(), x[0], torch.randn(2, 63), x.to("meta")):
        with pytest.raises(SettingError, match="x="):
            few_rows(bad, w)
    for start, stop in ((-1, 5), (5, 4), (0, 21)):
        with pytest.raises(SettingError, match="start, stop="):
            few_rows(x, w, start, stop)
    with pytest.raises(SettingError, match="bias="):
        few_rows(x, w, 0, 10, torch.zeros(20))
    with pytest.raises(SettingError, match="out="):
        few_rows(x, w, out=torch.empty(20, 2).T)


# -- nested FFN


def random_ffn(case, sizes, width, is_own, g):
    f = sizes[-1]
    gate, up = (random_matrix(f, width, *case, g) for _ in range(2))
    downs = [random_matrix(width, size, *case, g) for size in (sizes if is_own else sizes[-1:])]
    biases = [torch.randn(width, generator=g) if i % 2 == 0 else None for i in range(len(downs))]
    return gate, up, downs, biases, sizes


@settings(deadline=None, max_examples=40)
@given(
    CASE,
    st.integers(0, 33),
    st.integers(1, 100),
    st.sets(st.integers(1, 250), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(sorted(ACTIVATIONS)),
    SEED,
)
def test_nested_ffn(case, num_rows, width, sizes, is_own, activation, seed):
    if case[1] and not is_own:
        sizes = {size * case[1] for size in sizes if size < 6} or {case[1]}
    g = seeded(seed)
    ffn = random_ffn(case, sorted(sizes), width, is_own, g)
    x = torch.randn(num_rows, width, generator=g)
    experts = torch.randint(-1, len(sizes), (num_rows,), generator=g)
    y, wanted = (run(x, *ffn, experts, activation) for run in (nested_ffn, plain.nested_ffn))
    assert y.shape == wanted.shape
    assert float((y - wanted).norm()) <= 3 * TOLERANCE[case[0]] * max(float(wanted.norm()), num_rows**0.5)
    assert torch.equal(y[experts < 0], torch.zeros(int((experts < 0).sum()), width))


def test_what_is_no_nested_ffn_is_refused():
    g = seeded(0)
    gate, up, downs, biases, sizes = random_ffn(("int4", 64), [64, 128], 32, False, g)
    x, experts = torch.randn(2, 32), torch.tensor([0, 1])
    for name, arguments in {
        "experts=": (x, gate, up, downs, biases, sizes, torch.tensor([0, 2])),
        "sizes=": (x, gate, up, downs, biases, [128, 64], experts),
        "gate, up=": (x, gate, up, downs, biases, [64, 127], experts),
        "downs=": (x, gate, up, [*downs, *downs, *downs], biases * 3, sizes, experts),
        "tile=": (x, gate, up, downs, biases, [70, 128], experts),
        "biases=": (x, gate, up, downs, [torch.zeros(3)], sizes, experts),
        "x=": (x[:, :5], gate, up, downs, biases, sizes, experts),
    }.items():
        with pytest.raises(SettingError, match=name):
            nested_ffn(*arguments)
    with pytest.raises(SettingError, match="activation='tanh'"):
        nested_ffn(x, gate, up, downs, biases, sizes, experts, "tanh")


# -- attention


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 400),
    st.sampled_from([1, 8, 20, 64, 80, 128, 256]),
    st.sampled_from([0.0, 3.0]),
    st.sampled_from([0, 1, 50]),
    st.integers(1, 5),
    SEED,
)
def test_attention(dtype, num_rows, num_kv_heads, group, num_slots, head_dim, softcap, window, num_threads, seed):
    g = seeded(seed)
    shape = (num_rows, num_kv_heads, num_slots, head_dim)
    q = 3 * torch.randn(num_rows, num_kv_heads * group, head_dim, generator=g)
    keys, values = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    lengths = torch.randint(0, num_slots + 1, (num_rows,), generator=g)
    starts = (torch.rand(num_rows, generator=g) * (lengths + 1)).long().clamp(max=lengths)
    for row in range(num_rows):  # what is not to be seen must not be touched
        keys[row, :, lengths[row] :], values[row, :, : starts[row]] = float("nan"), float("nan")
    options = {"scale": head_dim**-0.5, "softcap": softcap, "window": window}
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        y = decode_attention(q, keys, values, lengths, starts, **options)
    finally:
        torch.set_num_threads(before)
    wanted = plain.decode_attention(q, keys, values, lengths, starts, **options)
    near = 1e-2 if dtype == torch.bfloat16 else 1e-5  # weights of bfloat16 values may be rounded to that
    assert torch.allclose(y, wanted, rtol=1e-4, atol=near)


def test_scores_of_any_size():
    keys = torch.zeros(1, 1, 3, 16)
    keys[0, 0, :, 0] = torch.tensor([-3e4, 0.0, 3e4])
    values = torch.arange(3.0)[None, None, :, None].expand(1, 1, 3, 16).contiguous()
    q = torch.zeros(1, 1, 16)
    q[..., 0] = 1
    y = decode_attention(q, keys, values, torch.tensor([3]), torch.tensor([0]), scale=1.0)
    assert torch.equal(y, torch.full((1, 1, 16), 2.0))


def test_caches_that_cannot_be_read_are_refused():
    q, keys = torch.randn(2, 4, 8), torch.randn(2, 2, 10, 8)
    lengths, starts = torch.tensor([10, 3]), torch.tensor([0, 1])

    def run(q=q, keys=keys, lengths=lengths, starts=starts):
        return decode_attention(q, keys, keys, lengths, starts, scale=1.0)

    run()
    for name, bad in {
        "q=": {"q": q[:, :, :5]},
        "heads=": {"q": q[:, :3].contiguous()},
        "keys, values=": {"keys": keys.transpose(2, 3)},
        "cache dtype=": {"keys": keys.double()},
        "starts, lengths=": {"lengths": torch.tensor([11, 3])},
        "starts=": {"starts": torch.tensor([0.0, 1.0])},
    }.items():
        with pytest.raises(SettingError, match=name):
            run(**bad)


# -- threads


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_any_number_of_threads(num_threads):
    g = seeded(3)
    ffn = random_ffn(("bf16", 0), [64, 128, 320], 72, True, g)
    x, experts = torch.randn(7, 72, generator=g), torch.tensor([2, 0, -1, 1, 1, 2, 0])
    wanted = nested_ffn(x, *ffn, experts)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(nested_ffn(x, *ffn, experts), wanted)
    finally:
        torch.set_num_threads(before)


def test_callers_in_several_threads():
    w = random_matrix(300, 200, "int8", 0, seeded(0))
    inputs = [torch.randn(3, 200, generator=seeded(i)) for i in range(4)]
    wanted = [few_rows(x, w) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        torch.set_num_threads(2)
        for _ in range(200):
            if not torch.equal(few_rows(inputs[i], w), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    assert not wrong
