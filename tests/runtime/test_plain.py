"""The plain decode step against `transformers`, for each family and for every setting of the dial."""

from __future__ import annotations

import pytest
import torch

from rheostat.runtime.building import SUPPORTED, Unsupported, build
from rheostat.runtime.cache import KVCache
from rheostat.runtime.plain import step
from rheostat.runtime.rope import RopeTable
from rheostat.spending import spend
from tests.tiny import VOCAB, tiny_adapted, tiny_model


def empty_cache(weights, num_rows: int) -> KVCache:
    return KVCache(
        num_layers=len(weights.layers),
        num_rows=num_rows,
        num_kv_heads=weights.num_kv_heads,
        head_dim=weights.head_dim,
    )


@torch.inference_mode()
def run_plain(weights, ids: torch.Tensor, settings: torch.Tensor | None = None):
    """Token by token. Returns logits [B, T, V] and experts [T, L, B] (or None)."""
    cache, rope = empty_cache(weights, len(ids)), RopeTable(weights.inv_freq, weights.rope_scale)
    logits, experts = [], []
    for place in range(ids.shape[1]):
        positions = torch.full((len(ids),), place)
        out, chosen = step(weights, ids[:, place], positions, cache, settings, rope)
        logits.append(out)
        experts.append(chosen)
    return torch.stack(logits, 1), experts


def ids_of(num_rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", SUPPORTED)
def test_logits_are_those_of_transformers(family):
    model, ids = tiny_model(family), ids_of(2, 20)
    with torch.inference_mode():
        expected = model(ids).logits
    found, experts = run_plain(build(model), ids)
    assert experts == [None] * 20
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_windows_are_kept():
    model, ids = tiny_model("mistral"), ids_of(2, 40)
    model.config.sliding_window = 8
    with torch.inference_mode():
        expected = model(ids).logits
    found, _ = run_plain(build(model), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["damage", "class"])
@pytest.mark.parametrize("refit", [True, False])
def test_experts_are_those_of_the_method(target, refit):
    adapted, ids = tiny_adapted(target=target, refit=refit), ids_of(3, 12)
    adapted.model.eval()
    prices = adapted.dial.settings["dynamoe"]
    native = prices[len(prices) // 2]
    expected = []
    with torch.inference_mode(), spend(native={"dynamoe": native}) as meter:
        cache = adapted.method.make_cache(adapted.model)
        adapted.model(ids[:, :1], past_key_values=cache)
        for place in range(1, 12):
            expected.append(adapted.model(ids[:, place : place + 1], past_key_values=cache).logits[:, 0])
    weights = build(adapted.model, adapted.hook_ids)
    cache, rope = empty_cache(weights, 3), RopeTable(weights.inv_freq)
    counts = torch.zeros(2, 4, dtype=torch.long)
    with torch.inference_mode():
        step(weights, ids[:, 0], torch.zeros(3, dtype=torch.long), cache, None, rope)  # a first token is never cut
        for place in range(1, 12):
            settings = torch.full((3,), native)
            logits, experts = step(weights, ids[:, place], torch.full((3,), place), cache, settings, rope)
            torch.testing.assert_close(logits, expected[place - 1], rtol=1e-3, atol=1e-3)
            counts += torch.stack([torch.bincount(one, minlength=4) for one in experts])
    counts[:, 3] += 3
    assert int(counts[:, :3].sum()) > 0, "nothing was cut: the test shows nothing"
    assert torch.equal(counts, torch.stack([meter.expert_counts[0], meter.expert_counts[1]]))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_other_families_are_refused(family):
    with pytest.raises(Unsupported, match=family):
        build(tiny_model(family))
