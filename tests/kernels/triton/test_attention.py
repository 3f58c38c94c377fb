from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import SettingError
from rheostat.kernels import plain
from rheostat.kernels.triton import decode_attention
from rheostat.kernels.triton.attention import CANDIDATES, Splits, choose_count
from tests.kernels.triton.cases import DEVICE, TOLERANCE, distance, random_rows, seeded

DTYPES = sorted(TOLERANCE, key=str)


def random_cache(num_rows, kv_heads, slots, head_dim, dtype, g):
    """Keys and values, lengths and starts; what is beyond a row's slots is NaN."""
    keys, values = (random_rows(num_rows, kv_heads, slots, head_dim, g=g, dtype=dtype) for _ in range(2))
    lengths = torch.randint(0, slots + 1, (num_rows,), generator=g)
    starts = (torch.rand(num_rows, generator=g) * (lengths + 2)).long()  # some rows see nothing
    return keys, values, lengths.to(DEVICE), starts.to(DEVICE)


@settings(deadline=None, max_examples=8)
@given(
    st.integers(1, 3),
    st.sampled_from([(9, 3), (4, 4), (8, 1), (6, 2)]),
    st.integers(1, 200),
    st.sampled_from([64, 16, 80, 20, 1]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 7, 90]),
    st.sampled_from([0.0, 3.0]),
    st.sampled_from([Splits(), Splits(3, 16)]),
    st.integers(0, 99),
)
def test_decode_attention(num_rows, heads, slots, head_dim, dtype, cache_dtype, window, softcap, splits, seed):
    g = seeded(seed)
    cache = random_cache(num_rows, heads[1], slots, head_dim, cache_dtype, g)
    q = random_rows(num_rows, heads[0], head_dim, g=g, dtype=dtype)
    given = {"scale": head_dim**-0.5, "softcap": softcap, "window": window}
    y = decode_attention(q, *cache, **given, splits=splits)
    wanted = plain.decode_attention(q.float(), *cache, **given)
    assert (y.shape, y.dtype) == (wanted.shape, dtype)
    assert float((y.float() - wanted).norm()) <= 2 * TOLERANCE[dtype] * max(float(wanted.norm()), 1.0)
    first = torch.maximum(cache[3], cache[2] - window) if window else cache[3]
    assert not y[first >= cache[2]].any()


@pytest.mark.parametrize("splits", CANDIDATES)
def test_every_way_to_cut(splits):
    g = seeded(0)
    keys, values = (random_rows(1, 1, 150, 32, g=g) for _ in range(2))
    cache = keys, values, torch.tensor([147], device=DEVICE), torch.tensor([3], device=DEVICE)
    q = random_rows(1, 3, 32, g=g)
    wanted = plain.decode_attention(q, *cache, scale=0.2)
    assert distance(decode_attention(q, *cache, scale=0.2, splits=splits), wanted) < 3e-6


def test_slots_that_a_row_does_not_have_are_never_read():
    g = seeded(1)
    keys, values, *_ = random_cache(2, 2, 100, 32, torch.float32, g)
    lengths, starts = torch.tensor([70, 33], device=DEVICE), torch.tensor([5, 0], device=DEVICE)
    q = random_rows(2, 4, 32, g=g)
    whole = decode_attention(q, keys, values, lengths, starts, scale=0.2)
    for cache in (keys, values):
        cache[0, :, :5] = cache[0, :, 70:] = cache[1, :, 33:] = float("nan")
    assert torch.equal(decode_attention(q, keys, values, lengths, starts, scale=0.2), whole)


def test_large_scores_and_strides():
    g = seeded(2)
    lengths, starts = torch.tensor([40, 90], device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    room = random_rows(2, 120, 2, 48, g=g)  # [B, S, K, d], one layer of a cache laid out by token
    keys, values = (room[:, start : start + 90, :, 8:40].transpose(1, 2) for start in (0, 20))
    q = 200 * random_rows(2, 2, 32, g=g).transpose(1, 2).contiguous().transpose(1, 2)
    wanted = plain.decode_attention(q, keys, values, lengths, starts, scale=1.0)
    assert distance(decode_attention(q, keys, values, lengths, starts, scale=1.0), wanted) < 1e-5


def test_the_work_is_cut_by_the_size_of_the_cache():
    assert choose_count(1, 64, 64) == 1
    assert choose_count(8, 4096, 64) == 33
    assert choose_count(8, 1024, 64) == 16
    assert choose_count(1000, 1 << 20, 64) == 1


def test_what_does_not_fit_is_refused():
    g = seeded(0)
    keys, values, lengths, starts = random_cache(2, 2, 10, 8, torch.float32, g)
    q = random_rows(2, 4, 8, g=g)
    for bad in (q[0], q.double()):
        with pytest.raises(SettingError, match="q="):
            decode_attention(bad, keys, values, lengths, starts, scale=1.0)
    for bad in (keys[:1], keys.half(), keys[..., :7], keys.transpose(2, 3).contiguous().transpose(2, 3), keys[:, :0]):
        with pytest.raises(SettingError, match="keys, values="):
            decode_attention(q, bad, values, lengths, starts, scale=1.0)
    for name, bad in (("lengths", lengths.float()), ("starts", starts[:1])):
        with pytest.raises(SettingError, match=f"{name}="):
            decode_attention(q, keys, values, **{"lengths": lengths, "starts": starts, name: bad}, scale=1.0)
    for name in ("softcap", "window"):
        with pytest.raises(SettingError, match=f"{name}=-1"):
            decode_attention(q, keys, values, lengths, starts, scale=1.0, **{name: -1})
