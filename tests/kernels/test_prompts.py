"""The kernels for prompts against their plain twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat import kernels
from rheostat.errors import SettingError
from rheostat.kernels import pack, plain
from rheostat.kernels.prompts import causal_attention, grouped_ffn, many_rows
from tests.kernels.cases import TOLERANCE, distance, random_matrix

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler")

FEW = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(
    st.sampled_from(["bf16", "fp32"]),
    st.integers(0, 40),
    st.integers(1, 150),
    st.integers(1, 200),
    st.booleans(),
    SEEDS,
)
@FEW
def test_many_rows(format, num_rows, num_outputs, num_inputs, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    w = random_matrix(num_outputs, num_inputs, format, 0, generator)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    bias = torch.randn(num_outputs, generator=generator) if has_bias else None
    wanted = plain.few_rows(x, w, bias=bias)
    y = many_rows(x, w, bias)
    assert y.shape == wanted.shape
    terms = (
        x.square() @ w.unpack().square().T
    )  # of a single number, the error shows against what was added, not the sum
    assert float((y - wanted).norm()) <= 2 * TOLERANCE[format] * float(terms.sum().sqrt())


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_of_several_chunks_and_a_strided_input(num_threads):
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    w = random_matrix(200, 100, "bf16", 0, generator)
    x = torch.randn(100, 700, generator=generator).t()
    y = many_rows(x, w)
    assert distance(y, plain.few_rows(x.contiguous(), w)) < TOLERANCE["bf16"]
    alone = torch.cat([many_rows(one[None], w) for one in x[::97]])
    assert torch.equal(alone, y[::97]), "a row does not depend on its neighbours"


@given(
    st.integers(0, 60),
    st.integers(1, 70),
    st.lists(st.integers(1, 90), min_size=1, max_size=4, unique=True),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["silu", "gelu_tanh", "gelu", "relu"]),
    SEEDS,
)
@FEW
def test_grouped_ffn(num_rows, width, sizes, is_own, has_bias, activation, seed):
    generator, sizes = torch.Generator().manual_seed(seed), sorted(sizes)
    gate, up = (random_matrix(sizes[-1], width, "bf16", 0, generator) for _ in range(2))
    downs = [random_matrix(width, size, "bf16", 0, generator) for size in (sizes if is_own else sizes[-1:])]
    biases = [torch.randn(width, generator=generator) if has_bias else None for _ in downs]
    x = torch.randn(num_rows, width, generator=generator)
    experts = torch.randint(-1, len(sizes), (num_rows,), generator=generator)
    y = grouped_ffn(x, gate, up, downs, biases, sizes, experts, activation)
    wanted = plain.nested_ffn(x, gate, up, downs, biases, sizes, experts, activation)
    assert y.shape == wanted.shape
    for row, other, expert in zip(y, wanted, experts, strict=True):
        assert torch.equal(row, other) if expert < 0 else float((row - other).norm()) < 0.03 * (1 + float(other.norm()))


def test_channels_beyond_a_rows_width_do_not_count():
    """Whatever a wider row left in the same places."""
    generator = torch.Generator().manual_seed(3)
    gate, up = (random_matrix(37, 24, "bf16", 0, generator) for _ in range(2))
    down = random_matrix(24, 37, "bf16", 0, generator)
    x = 100 * torch.randn(50, 24, generator=generator)
    for experts in (torch.full((50,), 1), torch.zeros(50, dtype=torch.long)):
        y = grouped_ffn(x, gate, up, [down], [None], [5, 37], experts)
        wanted = plain.nested_ffn(x, gate, up, [down], [None], [5, 37], experts)
        assert distance(y, wanted) < 0.02


@given(
    st.integers(0, 90),
    st.integers(0, 400),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 80),
    st.sampled_from([0, 0, 1, 7, 100, 300]),
    st.integers(1, 3),
    SEEDS,
)
@FEW
def test_causal_attention(num_queries, past, num_kv_heads, group, head_dim, window, num_threads, seed):
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_kv_heads * group, num_queries, head_dim, generator=generator)
    keys, values = (torch.randn(num_kv_heads, past + num_queries, head_dim, generator=generator) for _ in range(2))
    out = causal_attention(q, keys, values, scale=head_dim**-0.5, window=window)
    wanted = plain.causal_attention(q, keys, values, scale=head_dim**-0.5, window=window)
    assert out.shape == wanted.shape
    assert float((out - wanted).abs().max()) < 0.06 if num_queries else True


@pytest.mark.parametrize("window", [0, 200])
def test_a_token_sees_what_it_may_and_nothing_else(window):
    """Values that name their slot: a token that saw one too many or too few would be far off."""
    num = 700
    q, keys = torch.zeros(1, num, 16), torch.zeros(1, num, 16)
    values = torch.zeros(1, num, 16)
    values[0, :, 0] = 1.0
    values[0, :, 1] = (torch.arange(num) >= 333).float()
    out = causal_attention(q, keys, values, scale=1.0, window=window)[0]
    seen = torch.arange(1, num + 1).clamp(max=window or num)
    new = (torch.arange(num) - 332).clamp(min=0).minimum(seen)
    torch.testing.assert_close(out[:, 0], torch.ones(num), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out[:, 1], new / seen, rtol=4e-3, atol=1e-3)


def test_scores_of_any_size():
    q = torch.tensor([[[300.0, 0.0], [-300.0, 1.0], [0.0, 0.0]]])
    keys = torch.tensor([[[300.0, 0.0], [-300.0, 0.0], [0.0, 5.0]]])
    values = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]])
    out = causal_attention(q, keys, values, scale=1.0)
    torch.testing.assert_close(out, plain.causal_attention(q, keys, values, scale=1.0), rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_refused():
    w = pack(torch.randn(4, 4), "int8")
    with pytest.raises(SettingError, match="format='int8'"):
        many_rows(torch.zeros(1, 4), w)
    with pytest.raises(SettingError, match="format="):
        grouped_ffn(torch.zeros(1, 4), w, w, [w], [None], [4], torch.tensor([0]))
    with pytest.raises(SettingError, match="x="):
        many_rows(torch.zeros(1, 5), pack(torch.randn(4, 4), "bf16"))
    q, kv = torch.zeros(4, 3, 8), torch.zeros(2, 3, 8)
    for name, arguments in {
        "q=": (torch.zeros(4, 3, 7), kv, kv),
        "values=": (q, kv, kv[:, :2]),
        "heads=": (q[:3], kv, kv),
        "q, window=": (q, kv[:, :2], kv[:, :2]),
    }.items():
        with pytest.raises(SettingError, match=name):
            causal_attention(*arguments, scale=1.0)
