from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.kernels import plain
from rheostat.kernels.structs import ACTIVATIONS
from rheostat.kernels.triton import DeviceMatrix, NestedWeights, nested_ffn
from rheostat.kernels.triton.ffn_few import FUSED
from rheostat.kernels.triton.ffn_many import GROUPED
from tests.kernels.triton.cases import DEVICE, FORMATS, TOLERANCE, distance, random_matrix, random_rows, seeded


def random_ffn(case, sizes, width, is_own, g):
    gate, up = (random_matrix(sizes[-1], width, *case, g) for _ in range(2))
    downs = [random_matrix(width, size, *case, g) for size in (sizes if is_own else sizes[-1:])]
    biases = [random_rows(width, g=g) if i % 2 == 0 else None for i in range(len(downs))]
    return gate, up, downs, biases, sizes


def random_experts(num_rows, num_experts, g):
    return torch.randint(-1, num_experts, (num_rows,), generator=g).to(DEVICE)


@settings(deadline=None, max_examples=10)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(sorted(TOLERANCE, key=str)),
    st.sampled_from([0, 1, 3, 16, 17, 40]),
    st.integers(1, 100),
    st.sets(st.integers(1, 200), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.integers(0, 99),
)
def test_nested_ffn(case, dtype, num_rows, width, sizes, is_own, activation, seed):
    g = seeded(seed)
    ffn = random_ffn(case, sorted(sizes), width, is_own, g)
    x = random_rows(num_rows, width, g=g, dtype=dtype)
    experts = random_experts(num_rows, len(sizes), g)
    y, wanted = nested_ffn(x, *ffn, experts, activation), plain.nested_ffn(x.float(), *ffn, experts, activation)
    assert (y.shape, y.dtype) == (wanted.shape, dtype)
    assert float((y.float() - wanted).norm()) <= 2 * TOLERANCE[dtype] * max(float(wanted.norm()), num_rows**0.5)
    assert not y[experts < 0].any()


@pytest.mark.parametrize("tiles", [*FUSED, *GROUPED])
@pytest.mark.parametrize("is_own", [False, True])
def test_every_way_to_cut(tiles, is_own):
    g = seeded(0)
    ffn = random_ffn(("int4", 32), [40, 96, 150], 70, is_own, g)
    for num_rows in (1, 9):
        x, experts = random_rows(num_rows, 70, g=g), random_experts(num_rows, 3, g) * 0 + 1
        y = NestedWeights.of(*ffn).run(x, experts, tiles=tiles)
        assert distance(y, plain.nested_ffn(x, *ffn, experts)) < 3e-6


@pytest.mark.parametrize("num_rows", [5, 30])
@pytest.mark.parametrize("is_own", [False, True])
def test_a_token_does_not_depend_on_its_neighbours(num_rows, is_own):
    g = seeded(3)
    weights = NestedWeights.of(*random_ffn(("bf16", 0), [30, 64, 130], 48, is_own, g))
    x, experts = random_rows(num_rows, 48, g=g), random_experts(num_rows, 3, g)
    together = weights.run(x, experts)
    for i in (0, num_rows // 2, num_rows - 1):
        alone = weights.run(x[i : i + 1].expand(num_rows, -1), experts[i].expand(num_rows))[0]
        assert torch.allclose(together[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 4, 20])
def test_what_is_beyond_the_widest_token_is_never_read(num_rows):
    """Weights there are NaN: multiplied by anything, they would show."""
    g = seeded(1)
    gate, up, down = random_rows(200, 40, g=g), random_rows(200, 40, g=g), random_rows(40, 200, g=g)
    x, experts = random_rows(num_rows, 40, g=g), torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    whole = [DeviceMatrix.view(one.clone()) for one in (gate, up, down)]
    gate[70:], up[70:], down[:, 70:] = float("nan"), float("nan"), float("nan")
    holed = [DeviceMatrix.view(one) for one in (gate, up, down)]
    found, wanted = (nested_ffn(x, a, b, [c], [None], [70, 200], experts) for a, b, c in (holed, whole))
    assert torch.equal(found, wanted)


def test_strided_input_and_views_of_weights():
    g = seeded(2)
    both = random_rows(2 * 96, 40, g=g)  # a fused gate and up
    down = random_rows(40, 128, g=g)[:, :96]
    ffn = (*(DeviceMatrix.view(part) for part in both.chunk(2)), [DeviceMatrix.view(down)], [None], [48, 96])
    for num_rows in (1, 3, 18):
        x = random_rows(num_rows, 80, g=g)[:, ::2]
        experts = random_experts(num_rows, 2, g)
        assert distance(nested_ffn(x, *ffn, experts), plain.nested_ffn(x, *ffn, experts)) < 3e-6 or experts.max() < 0


def test_weights_changed_in_place_are_seen():
    g = seeded(4)
    ffn = random_ffn(("fp32", 0), [20, 40], 16, True, g)
    weights = NestedWeights.of(*ffn)
    x, experts = random_rows(2, 16, g=g), torch.tensor([0, 1], device=DEVICE)
    for matrix in (ffn[0], *ffn[2]):
        matrix.values.mul_(-2)
    ffn[3][0].add_(1)
    assert distance(weights.run(x, experts), plain.nested_ffn(x, *ffn, experts)) < 3e-6


def test_bytes():
    g = seeded(0)
    gate, up, downs, biases, sizes = random_ffn(("bf16", 0), [64, 128], 32, True, g)
    own = NestedWeights.of(gate, up, downs, biases, sizes)
    shared = NestedWeights.of(gate, up, downs[1:], biases[1:], sizes)
    assert own.bytes_of([-1]) == shared.bytes_of([]) == 0
    assert own.bytes_of([0, -1]) == shared.bytes_of([0]) == 3 * 64 * 32 * 2
    assert own.bytes_of([0, 1]) == (2 * 128 + 64 + 128) * 32 * 2
    assert shared.bytes_of([0, 1]) == 3 * 128 * 32 * 2


def test_what_does_not_fit_is_refused():
    g = seeded(0)
    gate, up, downs, biases, sizes = random_ffn(("int8", 0), [64, 128], 32, True, g)
    x, experts = random_rows(2, 32, g=g), torch.tensor([0, 1], device=DEVICE)
    weights = NestedWeights.of(gate, up, downs, biases, sizes)
    for name, change in {
        "sizes": {"sizes": [128, 64]},
        "up, downs": {"up": random_matrix(128, 32, "bf16", 0, g)},
        "downs": {"downs": downs[:1]},
        "biases": {"biases": [torch.zeros(3, device=DEVICE), None]},
    }.items():
        given = {"gate": gate, "up": up, "downs": downs, "biases": biases, "sizes": sizes} | change
        with pytest.raises(SettingError, match=f"{name}="):
            NestedWeights.of(**given)
    for bad in (experts[:1], experts.float(), torch.tensor([0, 2], device=DEVICE)):
        with pytest.raises(SettingError, match="experts="):
            nested_ffn(x, gate, up, downs, biases, sizes, bad)
    with pytest.raises(SettingError, match="activation='tanh'"):
        weights.run(x, experts, "tanh")
    with pytest.raises(SettingError, match="x="):
        weights.run(x[:, :31], experts)
    with pytest.raises(SettingError, match="tiles="):
        weights.run(random_rows(17, 32, g=g), random_experts(17, 2, g), tiles=FUSED[0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("num_rows", [1, 8, 40])
def test_a_captured_call_follows_its_inputs(num_rows):
    """Nothing waits for the GPU, so a graph can hold the call; its replay reads experts and activations anew."""
    g = seeded(6)
    ffn = random_ffn(("bf16", 0), [64, 128, 256], 96, True, g)
    weights = NestedWeights.of(*ffn)
    x, experts = random_rows(num_rows, 96, g=g), random_experts(num_rows, 3, g)
    weights.run(x, experts)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = weights.run(x, experts)
    for _ in range(3):
        x.copy_(random_rows(num_rows, 96, g=g))
        experts.copy_(random_experts(num_rows, 3, g))
        graph.replay()
        assert torch.equal(y, weights.run(x, experts))
