"""Nested experts: prefixes of one FFN's channels, and three equal ways to run them.

Expert e keeps the first `sizes[e]` channels. Gate and up slices are views of the host's weights. The down projection
is either a view as well, or (after `solve.refit`) a matrix of the expert's own, [sizes[e], D] plus a bias.

Shapes: N tokens, D model width, F FFN width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rheostat.families import GatedMLP

Downs = nn.ModuleList
"""The smaller experts' own down projections (`nn.Linear`), smallest first, or empty."""


def expert_sizes(ffn_size: int, num_experts: int, tile: int) -> tuple[int, ...]:
    """Widths of the experts: (e + 1) / E of the FFN, rounded up to `tile` channels; the last is the whole FFN.

    Small FFNs may leave fewer distinct widths than asked; equal neighbours are merged.
    """
    sizes = [min(ffn_size, -(-ffn_size * (e + 1) // num_experts // tile) * tile) for e in range(num_experts)]
    return tuple(sorted({*sizes[:-1], ffn_size}))


def down_of(mlp: GatedMLP, downs: Downs, expert: int, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [D, size] and bias of an expert's down projection."""
    if expert < len(downs):
        return downs[expert].weight, downs[expert].bias  # type: ignore[return-value]
    return mlp.down.weight[:, :size], None


def run_one(x: torch.Tensor, mlp: GatedMLP, downs: Downs, expert: int, size: int) -> torch.Tensor:
    """One expert on all tokens [N, D]."""
    gate, up = mlp.gate_up(0, size)
    hidden = mlp.act(nn.functional.linear(x, gate)) * nn.functional.linear(x, up)
    weight, bias = down_of(mlp, downs, expert, size)
    return nn.functional.linear(hidden, weight, bias)


def run_grouped(
    x: torch.Tensor,
    choice: torch.Tensor,
    mlp: GatedMLP,
    downs: Downs,
    sizes: Sequence[int],
) -> torch.Tensor:
    """Each token through its expert: tokens sorted by width, one product per block of channels over a shrinking prefix.

    Args:
        x: [N, D].
        choice: [N] int64, expert indices; -1 skips the token (its output is zero).

    Returns:
        [N, D].
    """
    order = choice.argsort(descending=True, stable=True)
    counts = torch.bincount(choice + 1, minlength=len(sizes) + 1)[1:]  # [E]
    reach = counts.flip(0).cumsum(0).flip(0).tolist()  # tokens at least as wide as expert e
    if reach[0] == 0:
        return torch.zeros_like(x)
    sorted_x = x[order[: reach[0]]]
    out = torch.zeros_like(x)
    groups = counts.tolist()[::-1]  # tokens of each expert, widest first, as they are sorted
    # Split and not sliced: the gradient of a split is one copy, that of each slice a whole tensor of zeros.
    blocks = []  # hidden activations of each block of channels, over its prefix of the sorted tokens, by group
    for expert, (gate, up) in enumerate(mlp.gate_up_blocks(sizes)):
        rows = sorted_x[: reach[expert]]
        block = mlp.act(nn.functional.linear(rows, gate)) * nn.functional.linear(rows, up)
        blocks.append(block.split(groups[: len(sizes) - expert]))
    parts = []
    for expert in reversed(range(len(sizes))):
        group = len(sizes) - 1 - expert
        if not groups[group]:
            continue
        hidden = torch.cat([block[group] for block in blocks[: expert + 1]], dim=1)
        weight, bias = down_of(mlp, downs, expert, sizes[expert])
        parts.append(nn.functional.linear(hidden, weight, bias))
    return out.index_copy(0, order[: reach[0]], torch.cat(parts).to(out.dtype))


def run_naive(
    x: torch.Tensor,
    choice: torch.Tensor,
    mlp: GatedMLP,
    downs: Downs,
    sizes: Sequence[int],
) -> torch.Tensor:
    """The plain twin of `run_grouped`: every expert on every token through the host's own modules, then a selection.

    Slow, but it calls the host's projections as modules, so adapters on them (LoRA) take part.
    """
    hidden = mlp.hidden(x)  # [N, F]
    out = torch.zeros_like(x)
    for expert, size in enumerate(sizes):
        if expert < len(downs):
            y = downs[expert](hidden[:, :size])
        else:
            keep = torch.arange(hidden.shape[1], device=x.device) < size
            y = mlp.down(hidden * keep)
        out = torch.where((choice == expert)[:, None], y, out)
    return out
