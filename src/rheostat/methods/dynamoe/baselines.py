"""What a router has to beat, at the same mean width: the best width for each layer, and a router that draws lots.

Each baseline is an override for `rheostat.spend`: (layer, x [N, D]) -> expert [N].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Override = Callable[[int, torch.Tensor], torch.Tensor]


def baselines(model: PreTrainedModel, expert_counts: Mapping[int, torch.Tensor], seed: int) -> dict[str, Override]:
    """`static` and `random`, matched to how many tokens took each expert in each layer (layer -> [E])."""
    ffns: list[Any] = [layer.mlp for layer in families.layers(model)]
    counts = torch.stack([expert_counts[ffn.layer].double() for ffn in ffns]).cpu()  # [L, E]
    sizes = ffns[0].widths.double().cpu()
    mean_width = float((counts @ sizes).sum() / counts.sum())
    widths = static_widths(torch.stack([ffn.mean_damage for ffn in ffns]).cpu(), sizes, mean_width)
    generator = torch.Generator().manual_seed(seed)

    def static(layer: int, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x),), int(widths[layer]), device=x.device)

    def random(layer: int, x: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(counts[layer], len(x), replacement=True, generator=generator).to(x.device)

    return {"static": static, "random": random}


def static_widths(mean_damage: torch.Tensor, sizes: torch.Tensor, mean_width: float) -> torch.Tensor:
    """The best expert of each layer [L] by mean damage [L, E-1], with a mean width of at least `mean_width` channels.

    Greedy: from the smallest everywhere, buy the step (of one or more sizes) that saves most damage a channel. "At
    least", so that rounding favours the baseline.
    """
    damage = torch.nn.functional.pad(mean_damage.double(), (0, 1))  # [L, E]
    chosen = torch.zeros(len(damage), dtype=torch.long)
    last = damage.shape[1] - 1
    while float(sizes[chosen].mean()) < mean_width - 1e-6:
        best_gain, best = -1.0, (0, 0)
        for layer, now in enumerate(chosen.tolist()):
            for larger in range(now + 1, last + 1):
                gain = float((damage[layer, now] - damage[layer, larger]) / (sizes[larger] - sizes[now]))
                if gain > best_gain:
                    best_gain, best = gain, (layer, larger)
        chosen[best[0]] = best[1]
    return chosen
