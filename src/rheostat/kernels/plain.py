"""The plain PyTorch twins of the native kernels: the same signatures, for reading, for tests, and where there is no
compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rheostat.kernels.packed import PackedMatrix


def few_rows(
    x: torch.Tensor,
    w: PackedMatrix,
    start: int = 0,
    stop: int | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rheostat.kernels.few_rows`."""
    y = nn.functional.linear(x, w.unpack()[start : w.shape[0] if stop is None else stop], bias)
    return y if out is None else out.copy_(y)


def nested_ffn(
    x: torch.Tensor,
    gate: PackedMatrix,
    up: PackedMatrix,
    downs: Sequence[PackedMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    experts: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """See `rheostat.kernels.nested_ffn`."""
    y = torch.zeros(len(x), downs[0].shape[0])
    for expert, size in enumerate(sizes):
        rows = (experts == expert).nonzero()[:, 0]
        if len(rows):
            hidden = activate(few_rows(x[rows], gate, 0, size), activation) * few_rows(x[rows], up, 0, size)
            place = expert if len(downs) > 1 else 0
            y[rows] = nn.functional.linear(hidden, downs[place].unpack()[:, :size], biases[place])
    return y


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """One of `structs.ACTIVATIONS`."""
    if name == "gelu_tanh":
        return nn.functional.gelu(x, approximate="tanh")
    if name == "gelu":
        return nn.functional.gelu(x)
    return nn.functional.silu(x) if name == "silu" else nn.functional.relu(x)


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
) -> torch.Tensor:
    """See `rheostat.kernels.decode_attention`."""
    first = torch.maximum(starts, lengths - window) if window else starts
    slots = torch.arange(keys.shape[2])
    seen = (slots >= first[:, None]) & (slots < lengths[:, None])  # [B, S]
    group = q.shape[1] // keys.shape[1]
    k, v = (one.float().repeat_interleave(group, 1) for one in (keys, values))  # [B, H, S, d]
    scores = (k @ (q * scale)[..., None])[..., 0]  # [B, H, S]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return (weights[:, :, None] @ v.masked_fill(~seen[:, None, :, None], 0))[:, :, 0]


def causal_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, window: int = 0
) -> torch.Tensor:
    """See `rheostat.kernels.prompts.causal_attention`."""
    num_queries, num_slots = q.shape[1], keys.shape[1]
    back = torch.arange(num_slots - num_queries, num_slots)[:, None] - torch.arange(num_slots)
    hidden = (back < 0) | (back >= window) if window else back < 0
    group = q.shape[0] // keys.shape[0]
    k, v = (one.repeat_interleave(group, 0) for one in (keys, values))
    return (scale * q @ k.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1) @ v
