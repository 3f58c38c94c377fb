"""The routers' rules at near ties: settings just below and just above where another expert becomes the best."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rheostat import kernels
from rheostat.kernels import NativeDecoder
from rheostat.runtime import packing, plain
from rheostat.runtime.building import build
from rheostat.runtime.cache import KVCache
from rheostat.runtime.prefill import Prompt, embed, run_layers
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import DecoderWeights
from tests.kernels.test_decoder import routed

NEAR = 1e-3
"""How far settings are from a tie, relatively."""


def with_scores(target: str, scores: list[float]) -> DecoderWeights:
    """A decoder with four experts each quarter wider, whose routers say the same of every token."""
    weights = build(routed(target))
    layers = []
    for layer in weights.layers:
        router = layer.ffn.router
        assert layer.ffn.sizes == (16, 32, 48, 64)
        fixed = replace(
            router,
            inner=torch.zeros_like(router.inner),
            inner_bias=torch.zeros_like(router.inner_bias),
            outer_bias=torch.tensor(scores),
        )
        layers.append(replace(layer, ffn=replace(layer.ffn, router=fixed)))
    return replace(weights, layers=tuple(layers))


def damage_ties(scores: list[float]) -> list[tuple[float, int]]:
    """Settings near each tie of the rule of damage and price, and the expert that each gives, from the rule itself."""
    damages, shares = [*map(math.exp, scores), 0.0], (0.25, 0.5, 0.75, 1.0)
    ties = [(damages[a] - damages[b]) / (shares[b] - shares[a]) for a, b in pairwise(range(4))]
    assert ties == sorted(ties, reverse=True), "each expert is the best somewhere"
    return [(tie * side, a + (side < 1)) for a, tie in enumerate(ties) for side in (1 - NEAR, 1 + NEAR)]


def confidence_ties(scores: list[float]) -> list[tuple[float, int]]:
    """The same of the rule of confidence."""
    sums = torch.tensor(scores, dtype=torch.float64).softmax(0).cumsum(0).tolist()
    return [(1 - sums[e] * side, e + (side > 1)) for e in range(3) for side in (1 - NEAR, 1 + NEAR)]


CASES = {
    "damage": (with_scores, [-0.4, -1.3, -3.1], damage_ties),
    "class": (with_scores, [0.3, 1.0, -0.5, 0.2], confidence_ties),
}


@torch.inference_mode()
def chosen(weights: DecoderWeights, settings: torch.Tensor, side: str) -> torch.Tensor:
    """Experts [L, B] of a second token a row."""
    rope, num_rows = RopeTable(weights.inv_freq), len(settings)
    cache = KVCache(num_layers=2, num_rows=num_rows, num_kv_heads=weights.num_kv_heads, head_dim=weights.head_dim)
    ids = torch.full((num_rows, 2), 5)
    if side.startswith("prompt"):
        form = packing.native_prefill_form(weights, kernels.library()) if side == "prompt, native" else weights
        prompt = Prompt.of(ids, None)
        found = run_layers(form, range(2), embed(form, prompt), prompt, cache, settings, rope)
        return torch.stack(found)[:, 1::2]
    ids, positions = ids[:, 0].contiguous(), torch.zeros(num_rows, dtype=torch.long)
    if side == "step, native":
        form = packing.decode_form(weights, "fp32")
        return NativeDecoder(kernels.library(), form)(ids, positions, cache, settings, rope)[1]
    return plain.step(weights, ids, positions, cache, settings, rope)[1]


@pytest.mark.parametrize("side", ["step", "step, native", "prompt", "prompt, native"])
@pytest.mark.parametrize("target", CASES)
def test_near_ties_fall_as_the_rule_says(target, side):
    if kernels.library() is None and side.endswith("native"):
        pytest.skip("no compiler")
    make, scores, ties = CASES[target]
    wanted = ties(scores)
    assert {expert for _, expert in wanted} == {0, 1, 2, 3}
    found = chosen(make(target, scores), torch.tensor([setting for setting, _ in wanted]), side)
    for layer in found:
        assert layer.tolist() == [expert for _, expert in wanted]
