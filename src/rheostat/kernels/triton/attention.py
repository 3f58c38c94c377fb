"""Decode attention over a growing cache, on a GPU: split over the sequence, then combined.

A program takes one key/value head of one row and a stretch of its slots, and serves all query heads of the group, so
keys and values are read once and never repeated. It leaves an unfinished softmax: the weighted sum of values, the
largest score m and the sum l of exp(score - m). With M the largest m, the results combine as

    sum_i exp(m_i - M) acc_i / sum_i exp(m_i - M) l_i.

Stretches follow each row's own length, so ragged rows share the work; lengths stay on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.triton.language import DTYPES, check_device, dot, jit, next_power, tanh, tl

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Splits:
    """How attention is cut."""

    count: int = 0
    """Stretches of a row's slots; 0 chooses by the size of the cache and the number of rows."""
    slots: int = 64
    """Taken at a time."""
    warps: int = 4
    stages: int = 2


PROGRAMS = 264
"""What the default number of stretches aims at: two for each of an H100's 132 processors. Not tuned."""

CANDIDATES = (Splits(), Splits(0, 32), Splits(0, 128), Splits(8, 64), Splits(16, 64), Splits(32, 64), Splits(64, 64))


@jit
def online(q, k, v, seen, scale, softcap, acc, m, total):
    """One step of the softmax: queries q [R, d], keys k and values v [S, d], where seen [R, S]."""
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scale
    p, old, m, total = weigh(scores, seen, softcap, m, total)
    return dot(p.to(v.dtype), v, acc * old[:, None]), m, total


@jit
def weigh(scores, seen, softcap, m, total):
    """Scores [R, S] as weights against the largest score so far, what to multiply earlier sums with [R], that score,
    and the sum of all weights."""
    if softcap > 0:
        scores = softcap * tanh(scores / softcap)
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing yet
    p = tl.exp(scores - base[:, None])
    old = tl.exp(m - base)
    return p, old, top, total * old + tl.sum(p, 1)


@jit
def read_dense(
    q, keys, values, low, high, first, limit, scale, softcap, slot_stride, head_dim,
    R: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Slots low .. high of one head's keys and values; query r sees those from first[r] to limit[r] - 1."""
    d = tl.arange(0, BD)
    acc, m, total = tl.zeros((R, BD), tl.float32), tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    for start in range(low, high, BS):
        s = start + tl.arange(0, BS)
        place = s.to(tl.int64)[:, None] * slot_stride + d[None, :]
        mask = (s < high)[:, None] & (d < head_dim)[None, :]
        k = tl.load(keys + place, mask=mask, other=0.0).to(q.dtype)
        v = tl.load(values + place, mask=mask, other=0.0).to(q.dtype)
        seen = (s[None, :] >= first[:, None]) & (s[None, :] < limit[:, None]) & (s < high)[None, :]
        acc, m, total = online(q, k, v, seen, scale, softcap, acc, m, total)
    return acc, m, total


@jit
def load_queries(
    q, row, head, d, q_row, q_token, q_head, head_dim,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Queries [R, channels d] of one row and key/value head: token r // GROUP, head r % GROUP of the group."""
    r = tl.arange(0, R)
    place = row.to(tl.int64) * q_row + (r // GROUP)[:, None] * q_token + (head * GROUP + r % GROUP)[:, None] * q_head
    mask = (r < TOKENS * GROUP)[:, None] & (d < head_dim)[None, :]
    return tl.load(q + place + d[None, :], mask=mask, other=0.0)


@jit
def _stretch(
    q, keys, values, lengths, starts, parts, tops, totals, num_kv_heads, head_dim, scale, softcap, window,
    q_row, q_head, key_row, key_head, key_slot, value_row, value_head, value_slot,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """parts [B, K, SPLITS, GROUP, d], tops and totals [B, K, SPLITS, GROUP]: one stretch of one head's slots."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    length, low = tl.load(lengths + row).to(tl.int32), tl.load(starts + row).to(tl.int32)
    if window > 0:
        low = tl.maximum(low, length - window)
    size = tl.cdiv(tl.cdiv(tl.maximum(length - low, 0), SPLITS), BS) * BS
    begin = low + split * size
    d = tl.arange(0, BD)
    queries = load_queries(q, row, head, d, q_row, 0, q_head, head_dim, 1, GROUP, R)
    acc, m, total = read_dense(
        queries, keys + row.to(tl.int64) * key_row + head * key_head,
        values + row.to(tl.int64) * value_row + head * value_head,
        begin, tl.minimum(begin + size, length), tl.full((R,), 0, tl.int32) + low, tl.full((R,), 0, tl.int32) + length,
        scale, softcap, key_slot, head_dim, R, BS, BD,
    )  # fmt: skip
    leave(acc, m, total, parts, tops, totals, tl.program_id(0) * SPLITS + split, d, head_dim, GROUP, R)


@jit
def leave(acc, m, total, parts, tops, totals, place, d, head_dim, QUERIES: tl.constexpr, R: tl.constexpr):
    """Store an unfinished softmax of QUERIES queries at `place`; acc holds the channels d."""
    r = tl.arange(0, R)
    here = place.to(tl.int64) * QUERIES + r
    tl.store(parts + here[:, None] * head_dim + d[None, :], acc, mask=(r < QUERIES)[:, None] & (d < head_dim)[None, :])
    tl.store(tops + here, m, mask=r < QUERIES)
    tl.store(totals + here, total, mask=r < QUERIES)


@jit
def _combine(
    parts, tops, totals, out, num_kv_heads, head_dim, out_row, out_token, out_head,
    SPLITS: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, d]: the softmax of query `program_id(1)` of a head, finished; zeros where it saw nothing."""
    p, d, query = tl.arange(0, BP), tl.arange(0, BD), tl.program_id(1)
    here = (tl.program_id(0) * SPLITS + p).to(tl.int64) * QUERIES + query
    m = tl.load(tops + here, mask=p < SPLITS, other=float("-inf"))
    top = tl.max(m, 0)
    weight = tl.exp(m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight * tl.load(totals + here, mask=p < SPLITS, other=0.0), 0)
    mask = (p < SPLITS)[:, None] & (d < head_dim)[None, :]
    acc = tl.sum(weight[:, None] * tl.load(parts + here[:, None] * head_dim + d[None, :], mask=mask, other=0.0), 0)
    y = acc / tl.where(total > 0, total, 1.0)
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    place = row.to(tl.int64) * out_row + (query // GROUP) * out_token + (head * GROUP + query % GROUP) * out_head
    tl.store(out + place + d, y.to(out.dtype.element_ty), mask=d < head_dim)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    splits: Splits | None = None,
) -> torch.Tensor:
    """Attention of one token a row over its cache. `plain.decode_attention` is its twin.

    Args:
        q: [B, H, d] float32, bfloat16 or float16. Products are made in its dtype, sums in float32.
        keys, values: [B, K, S, d] of one float dtype, channels side by side; H is a multiple of K.
        lengths: [B] whole numbers, slots filled, the token's own among them.
        starts: [B] whole numbers, first slot that is not padding.
        scale: what scores are multiplied with.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        window: only the last `window` slots are seen; 0 is no limit.
        splits: how the work is cut.

    Returns:
        [B, H, d] in the dtype of q; zeros for a row that sees no slot.

    Raises:
        SettingError: shapes, dtypes or devices do not fit. Lengths are not looked at: they stay on the GPU.
    """
    if q.dim() != 3 or q.dtype not in DTYPES:
        raise bad_setting("q", f"{q.dtype} {tuple(q.shape)}", "floats [B, H, d]")
    check_cache(q[:, None], keys, values, "keys, values")
    check_counts(q, lengths=lengths, starts=starts)
    check_device(q.device)
    check_softmax(softcap, window)
    q = q if q.stride(-1) == 1 else q.contiguous()
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.numel():
        return out
    kv_heads, group = keys.shape[1], num_heads // keys.shape[1]
    splits = splits or Splits()
    count = splits.count or choose_count(num_rows * kv_heads, keys.shape[2], splits.slots)
    parts = Parts.empty(num_rows * kv_heads, count, group, head_dim, q.device)
    width = next_power(head_dim, 16)
    _stretch[(num_rows * kv_heads, count)](
        q, keys, values, lengths, starts, *parts.tensors, kv_heads, head_dim, float(scale), float(softcap), window,
        q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3], SPLITS=count, GROUP=group,
        R=next_power(group, 16), BS=splits.slots, BD=width, num_warps=splits.warps, num_stages=splits.stages,
    )  # fmt: skip
    parts.combine(out[:, None], kv_heads)
    return out


@dataclass(frozen=True)
class Parts:
    """Unfinished softmaxes of all rows and key/value heads."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Weighted sums [B * K, splits, queries, d], largest scores and sums [B * K, splits, queries]."""

    @classmethod
    def empty(cls, num_heads: int, splits: int, queries: int, head_dim: int, device: torch.device) -> Parts:
        """Room for them."""
        shape = (num_heads, splits, queries)
        sizes = ((*shape, head_dim), shape, shape)
        return cls(tuple(torch.empty(size, dtype=torch.float32, device=device) for size in sizes))  # type: ignore[arg-type]

    def combine(self, out: torch.Tensor, kv_heads: int) -> None:
        """Finish them into out [B, T, H, d]."""
        heads, splits, queries, head_dim = self.tensors[0].shape
        _combine[(heads, queries)](
            *self.tensors, out, kv_heads, head_dim, *out.stride()[:3], SPLITS=splits, QUERIES=queries,
            GROUP=out.shape[2] // kv_heads, BP=next_power(splits), BD=next_power(head_dim, 16), num_warps=4,
        )  # fmt: skip


def choose_count(num_heads: int, slots: int, block: int) -> int:
    """Stretches for each of `num_heads` rows and heads of a cache with room for `slots`."""
    return max(1, min(-(-slots // block), -(-PROGRAMS // num_heads), 128))


def check_cache(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, name: str) -> None:
    """Refuse a cache [B, K, S, d] that does not fit queries [B, T, H, d].

    Raises:
        SettingError: under the name given.
    """
    is_right = (
        keys.dim() == 4
        and keys.shape == values.shape
        and (keys.shape[0], keys.shape[3]) == (q.shape[0], q.shape[3])
        and keys.shape[1] > 0
        and q.shape[2] % keys.shape[1] == 0
        and keys.dtype == values.dtype
        and keys.dtype in DTYPES
        and keys.device == values.device == q.device
    )
    if (
        not is_right
        or any(one.shape[3] > 1 and one.stride(3) != 1 for one in (keys, values))
        or q.shape[3] > MAX_HEAD_DIM
    ):
        found = [(one.dtype, tuple(one.shape), str(one.device)) for one in (keys, values)]
        wanted = f"[{q.shape[0]}, K, S, {q.shape[3]}] of one float dtype on {q.device}, K a divisor of {q.shape[2]}"
        raise bad_setting(name, found, f"{wanted}, channels (at most {MAX_HEAD_DIM}) side by side")


def check_counts(q: torch.Tensor, **counts: torch.Tensor) -> None:
    """Refuse what is not a whole number for each row of q, on its device.

    Raises:
        SettingError: by its name.
    """
    for name, one in counts.items():
        is_whole = one.dtype in (torch.int32, torch.int64)
        if one.shape != (len(q),) or not is_whole or one.device != q.device or one.stride() != (1,):
            raise bad_setting(
                name, f"{one.dtype} {tuple(one.shape)} on {one.device}", f"whole numbers ({len(q)},) beside q"
            )


def check_softmax(softcap: float, window: int) -> None:
    """Refuse settings below zero.

    Raises:
        SettingError: one is.
    """
    for name, value in (("softcap", softcap), ("window", window)):
        if not value >= 0:
            raise bad_setting(name, value, "at least 0")
