"""Plain PyTorch twins, for the kernels here that have none in `kernels.plain`."""

from __future__ import annotations

import torch

from rheostat.kernels.triton.planes import NibbleBody


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
) -> torch.Tensor:
    """See `rheostat.kernels.triton.planes_attention`."""
    group = q.shape[2] // buffer_keys.shape[1]
    k = torch.cat([read_body(keys, -2, bits), buffer_keys.float()], 2).repeat_interleave(group, 1)  # [B, H, n + P, d]
    v = torch.cat([read_body(values, -1, bits), buffer_values.float()], 2).repeat_interleave(group, 1)
    body = keys.num_tokens
    slots = torch.arange(k.shape[2], device=q.device)
    token = torch.where(slots < body, slots, slots - body + body_lengths[:, None])  # [B, n + P]
    is_filled = (slots >= body) | (slots < body_lengths[:, None])
    last = lengths[:, None] - q.shape[1] + torch.arange(q.shape[1], device=q.device)  # [B, T], each query's own token
    seen = is_filled[:, None] & (token[:, None] <= last[..., None])  # [B, T, n + P]
    scores = q.float().transpose(1, 2) * scale @ k.transpose(2, 3)  # [B, H, T, n + P]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ v.masked_fill(~seen.any(1)[:, None, :, None], 0)).transpose(1, 2).to(q.dtype)


def read_body(body: NibbleBody, axis: int, bits: int) -> torch.Tensor:
    """The numbers [B, K, n, d] float32, in groups along `axis`, rounded to the dtype of their scales."""
    scale, zero = (one.float().repeat_interleave(body.group, axis) for one in (body.scale, body.zero))
    codes = nibbles(body.upper)
    if bits == 8:
        assert body.lower is not None
        codes, scale = codes * 16 + nibbles(body.lower) - 8, scale / 16
    return (codes * scale + zero).to(body.scale.dtype).float()


def nibbles(plane: torch.Tensor) -> torch.Tensor:
    """Bytes [..., d / 2] -> nibbles [..., d], float32."""
    return torch.stack([plane & 15, plane >> 4], -1).flatten(-2).float()
