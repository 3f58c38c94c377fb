"""Decode attention over a hierarchical cache, on a GPU: a body in two nibble planes and a buffer in full precision.

A draft reads the upper plane alone (4 bits a number), a target both (8 bits):

    4 bits  U S + Z          8 bits  (16 U + L - 8) S / 16 + Z

Programs take stretches of the body, rebuilding keys and values in registers, and stretches of the buffer, read as they
are; all leave unfinished softmaxes, which `attention` combines (as published: QuantSpec, arXiv 2502.10424; how the
work is cut is our choice). Two nibbles share a byte along a head's channels, so even and odd channels are multiplied
apart, each byte read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.triton.attention import (
    Parts,
    Splits,
    check_cache,
    check_counts,
    check_softmax,
    choose_count,
    leave,
    load_queries,
    read_dense,
    weigh,
)
from rheostat.kernels.triton.language import DTYPES, check_device, dot, dtype_of, jit, next_power, tl

MOST_QUERIES = 128
"""Tokens times query heads of one key/value head that one call takes."""


@dataclass(frozen=True)
class NibbleBody:
    """Keys or values [B, K, n, d] in nibble planes, as `caches.planes` makes them; rows are filled from place 0 on."""

    upper: torch.Tensor
    """[B, K, n, d / 2] uint8: channel 2i in the low half of a byte, 2i + 1 in the high half."""
    lower: torch.Tensor | None
    """The same for the lower plane, raised by 8; None where only 4 bits are kept."""
    scale: torch.Tensor
    """[B, K, n / group, d] for keys, [B, K, n, d / group] for values."""
    zero: torch.Tensor
    group: int
    """Tokens of one group for keys, channels of one for values."""

    @property
    def num_tokens(self) -> int:
        """n, room included that no row has filled."""
        return self.upper.shape[2]


@jit
def _codes(upper, lower, place, mask, BITS: tl.constexpr):
    """Codes of even and odd channels, float32: 0..15 of the upper plane, or 0..255 less 8 of both."""
    u = tl.load(upper + place, mask=mask, other=0).to(tl.int32)
    even, odd = u & 15, u >> 4
    if BITS == 8:
        low = tl.load(lower + place, mask=mask, other=0).to(tl.int32)
        even, odd = even * 16 + (low & 15) - 8, odd * 16 + (low >> 4) - 8
    return even.to(tl.float32), odd.to(tl.float32)


@jit
def _number(codes, scale, zero, place, mask, BITS: tl.constexpr, SCALES: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers from codes; their scales are at `place`. Rounded to the scales' dtype, as a reader of the cache sees."""
    s = tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(zero + place, mask=mask, other=0.0).to(tl.float32)
    if BITS == 8:
        s = s / 16
    return (codes * s + z).to(SCALES).to(DTYPE)


@jit
def _read_body(
    even, odd, key_upper, key_lower, key_scale, key_zero, value_upper, value_lower, value_scale, value_zero,
    low, high, limit, scale, softcap, half, plane_slot, key_scale_slot, value_scale_slot,
    BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, IS_WHOLE: tl.constexpr,
    SCALES: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Tokens low .. high of one head's body, by queries [R, BH] of even and of odd channels."""
    h = tl.arange(0, BH)
    acc, rest = tl.zeros((R, BH), tl.float32), tl.zeros((R, BH), tl.float32)
    m, total = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    for start in range(low, high, BS):
        s = start + tl.arange(0, BS)
        is_token, is_channel = s < high, h < half
        mask = is_token[:, None] & is_channel[None, :]
        place = s.to(tl.int64)[:, None] * plane_slot + h[None, :]
        a, b = _codes(key_upper, key_lower, place, mask, BITS)
        if KEY_GROUP % BS == 0:  # stretches begin at multiples of BS: one group for all these tokens
            line = (start // KEY_GROUP) * key_scale_slot + 2 * h[None, :]
            known = is_channel[None, :]
        else:
            line = (s // KEY_GROUP).to(tl.int64)[:, None] * key_scale_slot + 2 * h[None, :]
            known = mask
        k = _number(a, key_scale, key_zero, line, known, BITS, SCALES, DTYPE)
        scores = dot(even, tl.trans(k), tl.zeros((R, BS), tl.float32))
        k = _number(b, key_scale, key_zero, line + 1, known, BITS, SCALES, DTYPE)
        scores = dot(odd, tl.trans(k), scores) * scale
        seen = is_token[None, :] & (s[None, :] < limit[:, None])
        p, old, m, total = weigh(scores, seen, softcap, m, total)
        p = p.to(DTYPE)
        a, b = _codes(value_upper, value_lower, place, mask, BITS)
        line = s.to(tl.int64)[:, None] * value_scale_slot
        other, known = line, is_token[:, None]
        if not IS_WHOLE:  # a token's channels have several scales
            line, other, known = (
                line + ((2 * h) // VALUE_GROUP)[None, :],
                line + ((2 * h + 1) // VALUE_GROUP)[None, :],
                mask,
            )
        v = _number(a, value_scale, value_zero, line, known, BITS, SCALES, DTYPE)
        acc = dot(p, v, acc * old[:, None])
        v = _number(b, value_scale, value_zero, other, known, BITS, SCALES, DTYPE)
        rest = dot(p, v, rest * old[:, None])
    return acc, rest, m, total


@jit
def _stretch(
    q, buffer_keys, buffer_values, body_lengths, lengths, parts, tops, totals,
    key_upper, key_lower, key_scale, key_zero, value_upper, value_lower, value_scale, value_zero,
    num_kv_heads, head_dim, scale, softcap, q_row, q_token, q_head, buffer_row, buffer_head, buffer_slot,
    plane_row, plane_head, plane_slot, key_scale_row, key_scale_head, key_scale_slot,
    value_scale_row, value_scale_head, value_scale_slot,
    BODY_SPLITS: tl.constexpr, BUFFER_SPLITS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, IS_WHOLE: tl.constexpr,
    SCALES: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Unfinished softmaxes of one head: the first BODY_SPLITS programs read the body, the others the buffer."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    split, r = tl.program_id(1), tl.arange(0, R)
    body, length = tl.load(body_lengths + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    limit = length - (TOKENS - 1 - r // GROUP)  # [R], tokens that a query sees
    place = tl.program_id(0) * (BODY_SPLITS + BUFFER_SPLITS) + split
    if split < BODY_SPLITS:
        h = tl.arange(0, BH)
        even = load_queries(q, row, head, 2 * h, q_row, q_token, q_head, head_dim, TOKENS, GROUP, R)
        odd = load_queries(q, row, head, 2 * h + 1, q_row, q_token, q_head, head_dim, TOKENS, GROUP, R)
        size = tl.cdiv(tl.cdiv(body, BODY_SPLITS), BS) * BS
        plane = row.to(tl.int64) * plane_row + head * plane_head
        key_line = row.to(tl.int64) * key_scale_row + head * key_scale_head
        value_line = row.to(tl.int64) * value_scale_row + head * value_scale_head
        low_key, low_value = key_upper, value_upper
        if BITS == 8:
            low_key, low_value = key_lower, value_lower
        acc, rest, m, total = _read_body(
            even, odd, key_upper + plane, low_key + plane, key_scale + key_line, key_zero + key_line,
            value_upper + plane, low_value + plane, value_scale + value_line, value_zero + value_line,
            split * size, tl.minimum((split + 1) * size, body), limit, scale, softcap, head_dim // 2,
            plane_slot, key_scale_slot, value_scale_slot, BITS, KEY_GROUP, VALUE_GROUP, IS_WHOLE, SCALES, DTYPE,
            R, BS, BH,
        )  # fmt: skip
        leave(acc, m, total, parts, tops, totals, place, 2 * h, head_dim, TOKENS * GROUP, R)
        leave(rest, m, total, parts, tops, totals, place, 2 * h + 1, head_dim, TOKENS * GROUP, R)
    else:
        d = tl.arange(0, 2 * BH)
        queries = load_queries(q, row, head, d, q_row, q_token, q_head, head_dim, TOKENS, GROUP, R)
        held = length - body
        size = tl.cdiv(tl.cdiv(held, BUFFER_SPLITS), BS) * BS
        low = (split - BODY_SPLITS) * size
        begin = row.to(tl.int64) * buffer_row + head * buffer_head
        whole, top, sums = read_dense(
            queries, buffer_keys + begin, buffer_values + begin, low, tl.minimum(low + size, held),
            tl.zeros((R,), tl.int32), limit - body, scale, softcap, buffer_slot, head_dim, R, BS, 2 * BH,
        )  # fmt: skip
        leave(whole, top, sums, parts, tops, totals, place, d, head_dim, TOKENS * GROUP, R)


def planes_attention(
    q: torch.Tensor,
    keys: NibbleBody,
    values: NibbleBody,
    buffer_keys: torch.Tensor,
    buffer_values: torch.Tensor,
    body_lengths: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    bits: int = 8,
    softcap: float = 0.0,
    splits: Splits | None = None,
) -> torch.Tensor:
    """Attention of each row's newest tokens over its body and buffer. `plain.planes_attention` is its twin.

    Args:
        q: [B, T, H, d] float32, bfloat16 or float16, of the newest T tokens, which are in the buffer already; each sees
            itself and what is older. T times H / K is at most 128. Products are made in the dtype of q.
        keys, values: the body, tokens from place 0 on.
        buffer_keys, buffer_values: [B, K, P, d], tokens after the body from place 0 on, channels side by side.
        body_lengths: [B] whole numbers, tokens in each row's body.
        lengths: [B] whole numbers, tokens of each row, body and buffer together.
        scale: what scores are multiplied with.
        bits: 4 reads the upper plane only, 8 both.
        softcap: as for `decode_attention`.
        splits: how the work on the body is cut.

    Returns:
        [B, T, H, d] in the dtype of q; zeros for a token that sees nothing.

    Raises:
        SettingError: shapes, dtypes, devices or bits do not fit. Lengths are not looked at: they stay on the GPU.
    """
    _check(q, keys, values, buffer_keys, buffer_values, bits)
    check_counts(q, body_lengths=body_lengths, lengths=lengths)
    check_device(q.device)
    check_softmax(softcap, 0)
    q = q if q.stride(-1) == 1 else q.contiguous()
    num_rows, num_tokens, num_heads, head_dim = q.shape
    kv_heads = buffer_keys.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.numel():
        return out
    group, splits = num_heads // kv_heads, splits or Splits()
    count = splits.count or choose_count(num_rows * kv_heads, max(1, keys.num_tokens), splits.slots)
    spare = choose_count(num_rows * kv_heads, max(1, buffer_keys.shape[2]), 2 * splits.slots)
    parts = Parts.empty(num_rows * kv_heads, count + spare, num_tokens * group, head_dim, q.device)
    planes = [one for body in (keys, values) for one in (body.upper, body.lower, body.scale, body.zero)]
    if bits == 4:
        planes[1] = planes[5] = None  # a draft's kernel has nothing to read them by
    _stretch[(num_rows * kv_heads, count + spare)](
        q, buffer_keys, buffer_values, body_lengths, lengths, *parts.tensors, *planes, kv_heads, head_dim, float(scale),
        float(softcap), *q.stride()[:3], *buffer_keys.stride()[:3], *keys.upper.stride()[:3], *keys.scale.stride()[:3],
        *values.scale.stride()[:3], BODY_SPLITS=count, BUFFER_SPLITS=spare, TOKENS=num_tokens, GROUP=group, BITS=bits,
        KEY_GROUP=keys.group, VALUE_GROUP=values.group, IS_WHOLE=values.group == head_dim,
        SCALES=dtype_of(keys.scale.dtype), DTYPE=dtype_of(q.dtype),
        R=next_power(num_tokens * group, 16), BS=splits.slots, BH=next_power(head_dim // 2, 16),
        num_warps=splits.warps, num_stages=splits.stages,
    )  # fmt: skip
    parts.combine(out, kv_heads)
    return out


def bytes_read(
    keys: NibbleBody,
    values: NibbleBody,
    buffer_keys: torch.Tensor,
    body_lengths: Sequence[int],
    lengths: Sequence[int],
    bits: int,
) -> dict[str, int]:
    """Bytes of the cache that one call has to read.

    Args:
        keys, values, buffer_keys: as for `planes_attention`; only shapes and dtypes are looked at.
        body_lengths: tokens in each row's body, whole groups.
        lengths: tokens of each row.
        bits: 4 or 8.

    Returns:
        By part: `upper` and `lower` planes, `scales` with their zeros, and the `buffer`.
    """
    heads, head_dim = buffer_keys.shape[1], buffer_keys.shape[3]
    body, held = sum(body_lengths), sum(lengths) - sum(body_lengths)
    plane = 2 * heads * body * head_dim // 2
    scales = heads * body * head_dim // keys.group + heads * body * head_dim // values.group
    return {
        "upper": plane,
        "lower": plane if bits == 8 else 0,
        "scales": 2 * scales * keys.scale.element_size(),
        "buffer": 2 * heads * held * head_dim * buffer_keys.element_size(),
    }


def _check(
    q: torch.Tensor,
    keys: NibbleBody,
    values: NibbleBody,
    buffer_keys: torch.Tensor,
    buffer_values: torch.Tensor,
    bits: int,
) -> None:
    if q.dim() != 4 or q.dtype not in DTYPES:
        raise bad_setting("q", f"{q.dtype} {tuple(q.shape)}", "floats [B, T, H, d]")
    check_cache(q, buffer_keys, buffer_values, "buffer_keys, buffer_values")
    if buffer_keys.stride() != buffer_values.stride():
        raise bad_setting(
            "buffer_values", buffer_values.stride(), f"with the strides of buffer_keys, {buffer_keys.stride()}"
        )
    if q.shape[1] * (q.shape[2] // buffer_keys.shape[1]) > MOST_QUERIES:
        raise bad_setting("q", tuple(q.shape), f"at most {MOST_QUERIES} queries a key/value head: verify in turns")
    if bits not in (4, 8) or (bits == 8 and (keys.lower is None or values.lower is None)):
        raise bad_setting("bits", bits, "4, or 8 where both planes are kept")
    num_rows, heads, _, head_dim = buffer_keys.shape
    tokens = keys.num_tokens
    if head_dim % 2:
        raise bad_setting("head width", head_dim, "even: two nibbles share a byte")
    plane = (num_rows, heads, tokens, head_dim // 2)
    shapes = {
        "keys": (keys, (num_rows, heads, -(-tokens // max(1, keys.group)), head_dim)),
        "values": (values, (num_rows, heads, tokens, head_dim // max(1, values.group))),
    }
    for name, (body, lines) in shapes.items():
        planes = [one for one in (body.upper, body.lower) if one is not None]
        scales = [body.scale, body.zero]
        is_right = (
            body.group >= 1
            and (name == "keys" or head_dim % body.group == 0)
            and all(one.shape == plane and one.dtype == torch.uint8 for one in planes)
            and all(one.shape == lines and one.dtype == keys.scale.dtype in DTYPES for one in scales)
            and all(one.stride() == keys.upper.stride() and one.stride(3) == 1 for one in planes if one.numel())
            and all(one.stride() == body.scale.stride() and one.stride(3) == 1 for one in scales if one.numel())
            and all(one.device == q.device for one in (*planes, *scales))
        )
        if not is_right:
            found = [(one.dtype, tuple(one.shape), one.stride()) for one in (*planes, *scales)]
            wanted = (
                f"planes {plane}, scales and zeros {lines} in groups of {body.group}, on {q.device}, laid out alike"
            )
            raise bad_setting(name, found, wanted)
