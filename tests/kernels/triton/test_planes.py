from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.caches.hierarchical import HierarchicalLayer
from rheostat.caches.planes import quantise
from rheostat.errors import SettingError
from rheostat.kernels.triton import NibbleBody, bytes_read, language, planes_attention
from rheostat.kernels.triton import plain as twins
from rheostat.kernels.triton.attention import Splits
from tests.kernels.triton.cases import DEVICE, TOLERANCE, distance, random_rows, seeded


def random_body(shape, axis, group, dtype, g):
    found = quantise(random_rows(*shape, g=g, dtype=dtype), axis, group)
    return NibbleBody(found.upper, found.lower, found.scale, found.zero, group)


def random_cache(num_rows, kv_heads, head_dim, groups, group, value_group, num_tokens, dtype, g):
    """Bodies, buffers, and the lengths of bodies and rows, of `num_tokens` new tokens at least."""
    shape = (num_rows, kv_heads, groups * group, head_dim)
    keys, values = random_body(shape, -2, group, dtype, g), random_body(shape, -1, value_group, dtype, g)
    buffers = (random_rows(num_rows, kv_heads, 3 * group, head_dim, g=g, dtype=dtype) for _ in range(2))
    body = torch.randint(0, groups + 1, (num_rows,), generator=g) * group
    lengths = body + torch.randint(min(num_tokens, 3 * group), 3 * group + 1, (num_rows,), generator=g)
    return keys, values, *buffers, body.to(DEVICE), lengths.to(DEVICE)


@settings(deadline=None, max_examples=6)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([(9, 3), (4, 4), (8, 1)]),
    st.sampled_from([(64, 64), (20, 10), (40, 8), (12, 3)]),
    st.sampled_from([(0, 16), (1, 64), (3, 16), (4, 10)]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([4, 8]),
    st.sampled_from([0.0, 3.0]),
    st.sampled_from([Splits(), Splits(3, 16)]),
    st.integers(0, 99),
)
def test_planes_attention(num_rows, num_tokens, heads, widths, groups, cache_dtype, dtype, bits, softcap, splits, seed):
    g = seeded(seed)
    cache = random_cache(num_rows, heads[1], widths[0], *groups, widths[1], num_tokens, cache_dtype, g)
    q = random_rows(num_rows, num_tokens, heads[0], widths[0], g=g, dtype=dtype)
    given = {"scale": widths[0] ** -0.5, "bits": bits, "softcap": softcap}
    y, wanted = planes_attention(q, *cache, **given, splits=splits), twins.planes_attention(q, *cache, **given)
    assert (y.shape, y.dtype) == (wanted.shape, dtype)
    worst = max(TOLERANCE[dtype], TOLERANCE[cache_dtype] if language.IS_INTERPRETED else 0)  # it cuts off bfloat16
    assert float((y.float() - wanted.float()).norm()) <= 2 * worst * max(float(wanted.float().norm()), 1.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_attention_over_what_the_cache_shows(bits):
    """The newest tokens of a hierarchical cache, against the attention of torch over its contents."""
    g = seeded(5)
    layer = HierarchicalLayer(16, 32)
    layer.update(random_rows(2, 2, 75, 32, g=g), random_rows(2, 2, 75, 32, g=g))
    layer.record_past = True  # as a round of drafts does: the body waits
    layer.bits = bits
    seen = layer.update(random_rows(2, 2, 3, 32, g=g), random_rows(2, 2, 3, 32, g=g))
    assert layer.body_lengths == [48, 48]
    q = random_rows(2, 3, 4, 32, g=g)
    mask = torch.ones(3, 78, dtype=torch.bool, device=DEVICE).tril(75)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *seen, attn_mask=mask, scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    bodies = [NibbleBody(*body.tensors, body.group_size) for body in layer.body]
    lengths = (torch.tensor(one, device=DEVICE) for one in (layer.body_lengths, layer.lengths))
    found = planes_attention(q, *bodies, *layer._buffer, *lengths, scale=0.2, bits=bits)
    assert distance(found, wanted) < 3e-6


def test_a_draft_never_sees_the_lower_plane():
    g = seeded(1)
    keys, values, *rest = random_cache(2, 2, 32, 3, 16, 32, 1, torch.float32, g)
    q = random_rows(2, 1, 4, 32, g=g)
    draft = planes_attention(q, keys, values, *rest, scale=0.2, bits=4)
    without = planes_attention(q, replace(keys, lower=None), replace(values, lower=None), *rest, scale=0.2, bits=4)
    assert torch.equal(draft, without)
    target = planes_attention(q, keys, values, *rest, scale=0.2, bits=8)
    for body in (keys, values):
        body.lower.random_(generator=None)
    assert torch.equal(planes_attention(q, keys, values, *rest, scale=0.2, bits=4), draft)
    assert not torch.allclose(planes_attention(q, keys, values, *rest, scale=0.2, bits=8), target)


@pytest.mark.skipif(not language.IS_INTERPRETED, reason="counts the loads of Triton's interpreter")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value_group", [32, 8])
def test_bytes_read_are_those_loaded(bits, value_group, monkeypatch):
    """Every place of the cache that is loaded, counted once, against what `bytes_read` says."""
    from triton.runtime import interpreter

    g = seeded(2)
    keys, values, buffer_keys, buffer_values, *_ = random_cache(2, 2, 32, 3, 16, value_group, 2, torch.float32, g)
    body, lengths = torch.tensor([48, 16]), torch.tensor([65, 51])
    touched: set[int] = set()
    load = interpreter.InterpreterBuilder.create_masked_load

    def counting(self, ptrs, mask, other, *rest):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        for address in ptrs.data[mask.data].flatten().tolist():
            touched.update(range(address, address + size))
        return load(self, ptrs, mask, other, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    cache = keys, values, buffer_keys, buffer_values, body, lengths
    planes_attention(random_rows(2, 2, 4, 32, g=g), *cache, scale=0.2, bits=bits, splits=Splits(2, 16))
    parts = {
        "upper": (keys.upper, values.upper),
        "lower": (keys.lower, values.lower),
        "scales": (keys.scale, keys.zero, values.scale, values.zero),
        "buffer": (buffer_keys, buffer_values),
    }
    counted = {
        name: sum(len(touched.intersection(range(t.data_ptr(), t.data_ptr() + t.nbytes))) for t in tensors)
        for name, tensors in parts.items()
    }
    assert counted == bytes_read(keys, values, buffer_keys, body.tolist(), lengths.tolist(), bits)
    assert counted["upper"] == 2 * 64 * 2 * 16


def test_bytes_of_the_two_views():
    """8.25 and 4.25 bits a number in groups of 128, as published."""
    g = seeded(0)
    keys, values, buffer_keys, *_ = random_cache(1, 1, 128, 1, 128, 128, 1, torch.float16, g)
    for bits in (4, 8):
        found = bytes_read(keys, values, buffer_keys, [128], [128], bits)
        assert sum(found.values()) * 8 / (2 * 128 * 128) == bits + 0.25


def test_what_does_not_fit_is_refused():
    g = seeded(0)
    keys, values, *rest = random_cache(2, 2, 32, 2, 16, 32, 1, torch.float32, g)
    q = random_rows(2, 1, 4, 32, g=g)
    one_plane = replace(keys, lower=None), replace(values, lower=None)
    for name, arguments, bits in (
        ("bits", (q, keys, values), 5),
        ("bits", (q, *one_plane), 8),
        ("q", (q[:, 0], keys, values), 8),
        ("q", (random_rows(2, 65, 4, 32, g=g), keys, values), 8),
        ("keys", (q, replace(keys, group=8), values), 8),
        ("keys", (q, replace(keys, zero=keys.zero.half()), values), 8),
        ("values", (q, keys, replace(values, upper=values.upper[:, :, :-1])), 8),
        ("values", (q, keys, replace(values, group=0)), 8),
    ):
        with pytest.raises(SettingError, match=f"{name}="):
            planes_attention(*arguments, *rest, scale=0.2, bits=bits)
    with pytest.raises(SettingError, match="body_lengths="):
        planes_attention(q, keys, values, *rest[:2], rest[2].float(), rest[3], scale=0.2)
