"""What else could read a prompt for as little, for the benchmarks of predicted prompts; none of it is trained.

- `first_layers`: the model's first k layers alone, with its own norm and head;
- `fitted_layers`: the same, with an affine map from where they stop to where the last layer would have, solved by ridge
  regression on calibration text: what an auxiliary alone is worth that was given what the maps were given;
- `even_layers`: k layers spread evenly over the model, alone;
- `Dropping`: the whole model on a random share of the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rheostat import families
from rheostat.methods import Method
from rheostat.methods.kv_prediction.auxiliary import pruned_copy


def first_layers(model: Any, depth: int) -> Any:
    """A model of its own."""
    return pruned_copy(model, list(range(depth)))


def even_layers(model: Any, depth: int) -> Any:
    """A model of its own, with the first and the last layer."""
    last = len(families.layers(model)) - 1
    return pruned_copy(model, [round(k * last / (depth - 1)) for k in range(depth)])


@torch.no_grad()
def fitted_layers(
    model: Any, depths: Iterable[int], windows: torch.Tensor, *, ridge: float = 1e-3, batch: int = 4
) -> dict[int, Any]:
    """By depth, the first layers with an affine map before the norm.

    Args:
        windows: [W, T] of calibration text.
        ridge: relative to the mean of the Gram matrix's diagonal.
    """
    depths, ends = list(depths), []
    handle = families.decoder(model).norm.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    width = model.config.hidden_size
    sums = {
        depth: (torch.zeros(width + 1, width + 1).double(), torch.zeros(width + 1, width).double()) for depth in depths
    }
    for part in windows.split(batch):
        out = families.decoder(model)(part, output_hidden_states=True, use_cache=False)
        y = ends.pop()[:, 1:].flatten(0, 1).double()  # the first token is like no other
        for depth, (gram, cross) in sums.items():
            x = torch.nn.functional.pad(out.hidden_states[depth][:, 1:].flatten(0, 1).double(), (0, 1), value=1.0)
            gram += x.T @ x
            cross += x.T @ y
    handle.remove()
    found = {}
    for depth, (gram, cross) in sums.items():
        penalty = ridge * gram.diagonal()[:-1].mean() * torch.eye(width + 1, dtype=gram.dtype)
        penalty[-1, -1] = 0
        solved = torch.linalg.solve(gram + penalty, cross)  # [D + 1, D]
        small = first_layers(model, depth)
        mapped = torch.nn.Linear(width, width).to(model.dtype)
        mapped.weight.copy_(solved[:-1].T)
        mapped.bias.copy_(solved[-1])
        decoder = families.decoder(small)
        decoder.norm = torch.nn.Sequential(mapped, decoder.norm)
        found[depth] = small
    return found


@dataclass(frozen=True, kw_only=True)
class Dropping(Method):
    """Prompts lose all but a random share of their tokens; the first and the last stay, positions close up."""

    name: ClassVar[str] = "dropping"
    stages: ClassVar[frozenset[str]] = frozenset({"prefill"})

    share: float = 0.5
    seed: int = 0

    def prefill(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Any) -> torch.Tensor:
        """As the model reads them; `attention_mask` is changed in place, so that steps to come do not see them."""
        for row in attention_mask:
            valid = row.nonzero()[1:-1, 0]
            count = len(valid) + 2 - max(2, round(self.share * (len(valid) + 2)))
            generator = torch.Generator().manual_seed(self.seed + len(valid))
            row[valid[torch.randperm(len(valid), generator=generator)[: max(0, count)]]] = 0
        return super().prefill(model, input_ids, attention_mask, cache)
