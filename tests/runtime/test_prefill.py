"""Prefill against `transformers` and against the plain step; groups of tokens against one token at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rheostat.runtime.building import build
from rheostat.runtime.cache import KVCache
from rheostat.runtime.packing import prefill_form
from rheostat.runtime.plain import nested_ffn, product, rms_norm
from rheostat.runtime.prefill import (
    Prompt,
    causal,
    embed,
    grouped_ffn,
    prefill,
    run_layers,
    set_lengths,
    whole_ffn,
)
from rheostat.runtime.rope import RopeTable
from tests.tiny import VOCAB, tiny_adapted, tiny_model

LENGTHS = (40, 1, 23)
MASK = torch.tensor([[0] * (40 - n) + [1] * n for n in LENGTHS])
IDS = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(5)) * MASK


@torch.inference_mode()
def read(weights, ids=IDS, mask=MASK, settings=None, dtype=torch.float32):
    """Logits [B, V], the cache and the experts."""
    cache = KVCache(
        num_layers=2, num_rows=len(ids), num_kv_heads=weights.num_kv_heads, head_dim=weights.head_dim, dtype=dtype
    )
    rope = RopeTable(weights.inv_freq, weights.rope_scale)
    hidden, experts = prefill(prefill_form(weights, dtype), Prompt.of(ids, mask), cache, settings, rope)
    return product(weights.head, hidden), cache, experts


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"])
def test_logits_and_cache_are_those_of_transformers(family):
    model = tiny_model(family)
    if family == "mistral":
        model.config.sliding_window = 8
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = model(IDS, attention_mask=MASK, position_ids=positions, use_cache=True)
    logits, cache, experts = read(build(model))
    assert experts is None
    torch.testing.assert_close(logits, expected.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == list(LENGTHS)
    if family != "mistral":  # there `transformers` keeps the window alone
        for row, length in enumerate(LENGTHS):
            for layer in range(2):
                theirs = expected.past_key_values.layers[layer]
                for ours, other in ((cache.keys, theirs.keys), (cache.values, theirs.values)):
                    torch.testing.assert_close(ours[layer, row, :, :length], other[row, :, -length:])


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3"])
@torch.inference_mode()
def test_ranges_of_layers_and_pieces_of_prompts(family):
    """All tokens through the first layer, then each row's last tokens alone through the second, on what the first piece
    left there; rows of the cache in another order."""
    model = tiny_model(family)
    if family == "mistral":
        model.config.sliding_window = 8
    weights = build(model)
    rope = RopeTable(weights.inv_freq)
    wanted, dense, _ = read(weights)
    cache = KVCache(num_layers=2, num_rows=4, num_kv_heads=2, head_dim=8)
    rows = [2, 0, 3]
    prompt = Prompt.of(IDS, MASK, rows=rows)
    h = embed(weights, prompt)
    assert run_layers(weights, range(1), h, prompt, cache, None, rope) is None
    assert not cache.keys[1].any()
    assert not cache.lengths.any()
    halfway, outs = h.split(list(LENGTHS)), []
    for row, length in enumerate(LENGTHS):
        cuts = [0, length // 2, length - 1, length] if length > 1 else [0, 1]
        for start, stop in pairwise(cuts):
            ids = IDS[row : row + 1, 40 - length + start : 40 - length + stop]
            piece = Prompt.of(ids, None, rows=[rows[row]], pasts=[start])
            one = halfway[row][start:stop].clone()
            run_layers(weights, range(1, 2), one, piece, cache, None, rope)
        outs.append(one[-1])
    set_lengths(cache, prompt)
    assert cache.lengths.tolist() == [1, 0, 40, 23]
    logits = product(weights.head, rms_norm(torch.stack(outs), weights.final_norm, weights.eps))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    for row, length in zip(rows, LENGTHS, strict=True):
        mine = rows.index(row)
        torch.testing.assert_close(cache.keys[:, row, :, :length], dense.keys[:, mine, :, :length])
        torch.testing.assert_close(cache.values[:, row, :, :length], dense.values[:, mine, :, :length])


@pytest.mark.parametrize("length", [256, 257, 400, 512, 513])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("past", [0, 1, 150])
def test_attention_in_parts(length, window, past):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(4, length, 8, generator=generator)
    k, v = (torch.randn(2, past + length, 8, generator=generator) for _ in range(2))
    back = torch.arange(past, past + length)[:, None] - torch.arange(past + length)
    seen = (back >= 0) & ((back < window) if window else True)
    scores = torch.einsum("htd,hsd->hts", q, k.repeat_interleave(2, 0)) * 0.3
    wanted = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)
    torch.testing.assert_close(causal(q, k, v, scale=0.3, window=window), wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near():
    weights = build(tiny_model())
    exact, near = read(weights)[0], read(weights, dtype=torch.bfloat16)[0]
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("refit", [True, False])
def test_groups_are_tokens_one_by_one(refit):
    adapted = tiny_adapted(refit=refit)
    ffn = build(adapted.model, adapted.hook_ids).layers[0].ffn
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    for choice in (torch.randint(0, 4, (50,)), torch.zeros(50, dtype=torch.long), torch.full((50,), 3)):
        wanted = nested_ffn(ffn, x, choice, "silu")
        torch.testing.assert_close(grouped_ffn(ffn, x, choice, "silu"), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole_ffn(ffn, x, "silu"), wanted, rtol=1e-4, atol=1e-4)


def test_first_tokens_and_dense_rows_take_the_full_width():
    adapted = tiny_adapted()
    settings = torch.tensor([1e6, 1e6, 0.0])
    _, _, experts = read(build(adapted.model, adapted.hook_ids), settings=settings)
    assert experts is not None
    prompt = Prompt.of(IDS, MASK)
    assert prompt.firsts.tolist() == [0, 40, 41]
    for chosen in experts:
        assert chosen[prompt.firsts].tolist() == [3, 3, 3]
        assert chosen[1:40].tolist() == [0] * 39
        assert chosen[41:].tolist() == [3] * 23


def test_memory_of_forms_is_only_what_is_new():
    from rheostat.runtime.packing import own_bytes

    weights = build(tiny_model())
    assert own_bytes(prefill_form(weights, torch.float32), weights) == 0
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert own_bytes(prefill_form(weights, torch.bfloat16), weights) == 2 * matrices
