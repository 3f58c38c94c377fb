"""The router, and the rules that turn its output and the dial's setting into one expert a token.

Shapes: N tokens, D model width, U router width, E experts. Expert E-1 is the full FFN.
"""

from __future__ import annotations

import torch
from torch import nn


class Router(nn.Module):
    """Two small layers that read what the experts read: [N, D] -> [N, outputs] (our choice; the paper says
    "lightweight").

    With `target="damage"` there are E-1 outputs, the log of the damage that each smaller expert would do; with
    `target="class"` there are E, the logits of "this is the smallest expert that is good enough".
    """

    def __init__(self, hidden_size: int, width: int, num_outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, num_outputs)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, outputs], float32."""
        return self.outer(nn.functional.silu(self.inner(x))).float()

    @property
    def num_weights(self) -> int:
        """Weights multiplied for one token."""
        return self.inner.weight.numel() + self.outer.weight.numel()


def choose_by_damage(log_damage: torch.Tensor, price: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The expert with the least damage plus price times size: the Lagrangian of "least damage within a budget".

    One price for all tokens and layers is what makes the budget go where it helps most (our choice). A higher price
    never picks a larger expert; at price 0 every token takes the full FFN.

    Args:
        log_damage: [N, E-1], log of the expected damage of each smaller expert.
        price: [N], damage worth paying to save one whole FFN.
        shares: [E], each expert's width as a share of the full one, rising to 1.

    Returns:
        [N] int64, expert indices.
    """
    damage = torch.nn.functional.pad(log_damage.exp(), (0, 1))  # [N, E], the full FFN does none
    total = damage + price[:, None] * shares
    # Ties go to the larger expert, so flip before taking the first minimum.
    return total.shape[1] - 1 - total.flip(1).argmin(1)


def choose_by_confidence(logits: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    """The smallest expert that suffices with probability at least 1 - slack (1 - slack is the threshold theta).

    Args:
        logits: [N, E], class logits.
        slack: [N], 0 forces the full FFN, 1 the smallest expert.

    Returns:
        [N] int64, expert indices.
    """
    enough = logits.softmax(1).cumsum(1) >= 1 - slack[:, None]  # [N, E], True from some expert on
    enough[:, -1] = True  # the sum may round to just below 1
    chosen = enough.long().argmax(1)
    return torch.where(slack <= 0, logits.shape[1] - 1, chosen)
