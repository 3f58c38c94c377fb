"""The module that takes an FFN's place: reads the dial, asks the router, runs the chosen experts, bills the meter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rheostat.families import GatedMLP
from rheostat.methods.base import MeteredFFN
from rheostat.methods.dynamoe import gpu
from rheostat.methods.dynamoe.experts import down_of, run_grouped, run_naive, run_one
from rheostat.methods.dynamoe.routing import Router, choose_by_confidence, choose_by_damage
from rheostat.runtime.weights import FFNWeights, RouterWeights
from rheostat.skeleton import linear_around
from rheostat.spending import Held, Pass, Spending, current_pass, current_spending


class NestedFFN(MeteredFFN):
    """One layer's nested experts with their router.

    At the neutral setting it calls the host's own FFN and nothing else, so the dense model is reproduced bit for bit.
    """

    execution: str = "auto"
    """What runs the experts: one of `gpu.EXECUTIONS`."""

    order: torch.Tensor
    """[F] int64, the host's original channel at each place."""

    def __init__(self, mlp: GatedMLP, layer: int, sizes: Sequence[int], router: Router, target: str, key: str) -> None:
        super().__init__()
        self.host = mlp.host
        self.mlp = mlp
        self.layer = layer
        self.sizes = tuple(sizes)
        self.router = router
        self.target = target
        self.key = key
        self.downs = nn.ModuleList()
        """The experts' own down projections, smallest first; empty when all are views of the host's."""
        self.register_buffer("order", torch.arange(mlp.ffn_size), persistent=False)
        self.register_buffer("shares", torch.tensor(sizes, dtype=torch.float32) / sizes[-1], persistent=False)
        self.register_buffer("widths", torch.tensor(sizes), persistent=False)
        self.register_buffer("one_hot", torch.eye(len(sizes), dtype=torch.int64), persistent=False)
        self.register_buffer("mean_damage", torch.zeros(len(sizes) - 1), persistent=False)

    shares: torch.Tensor
    widths: torch.Tensor
    one_hot: torch.Tensor
    """[E, E] int64."""
    mean_damage: torch.Tensor
    """[E-1] float32, the mean damage of each smaller expert on the calibration text."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        one, spending = current_pass(), current_spending()
        choice = self.choose(x, one, spending)
        y = self.host(x) if choice is None else self.run(x.reshape(-1, x.shape[-1]), choice).view_as(x)
        if spending is not None and one is not None:
            self._bill(spending, one, choice, x.element_size())
            if one.held is not None and choice is not None:
                self._report(one.held, choice, x.shape[:2])
        return y

    def add_downs(self, *, has_bias: bool) -> None:
        """Give every smaller expert its own down projection [D, h], to be filled by a fit or from a file."""
        like, hidden_size = self.mlp.down.weight, self.mlp.hidden_size
        self.downs = nn.ModuleList(
            linear_around(
                nn.Parameter(like.new_empty(hidden_size, size)),
                nn.Parameter(like.new_empty(hidden_size)) if has_bias else None,
            )
            for size in self.sizes[:-1]
        )

    @torch.no_grad()
    def set_down(self, expert: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Fill a smaller expert's own down projection: weight [D, h] and, where it has one, bias [D]."""
        linear = self.downs[expert]
        linear.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            linear.bias.copy_(bias)  # type: ignore[operator]

    def runtime_weights(self) -> FFNWeights | None:
        """The experts, their own down projections and the router; None for adapters on the projections."""
        if self.is_naive:
            return None
        gate, up = self.mlp.gate_up(0, self.sizes[-1])
        places = [down_of(self.mlp, self.downs, expert, self.sizes[expert]) for expert in range(len(self.sizes))]
        places = places if len(self.downs) else places[-1:]
        return FFNWeights(
            gate=gate.detach(),
            up=up.detach(),
            downs=tuple(weight.detach() for weight, _ in places),
            down_biases=tuple(None if bias is None else bias.detach() for _, bias in places),
            sizes=self.sizes,
            router=RouterWeights(
                key=self.key,
                rule="confidence" if self.target == "class" else "damage",
                inner=self.router.inner.weight.detach(),
                inner_bias=self.router.inner.bias.detach(),
                outer=self.router.outer.weight.detach(),
                outer_bias=self.router.outer.bias.detach(),
            ),
        )

    # -- choosing

    def choose(self, x: torch.Tensor, one: Pass | None, spending: Spending | None) -> torch.Tensor | None:
        """Expert of each token [B * T], -1 for padding; None when every token takes the full FFN."""
        if one is None or spending is None:
            return None
        flat = x.reshape(-1, x.shape[-1])
        full = len(self.sizes) - 1
        if spending.override is not None:
            choice = spending.override(self.layer, flat)
        else:
            setting = one.settings.get(self.key) if one.held is None else self._held_setting(one.held, x.device)
            if setting is None or not bool((setting > 0).any()):
                return None
            by_token = setting if len(setting) == len(flat) else setting.repeat_interleave(x.shape[1])
            with torch.no_grad():
                choice = self.decide(self.router(flat), by_token)
        if one.is_plain:
            return choice
        choice = torch.where(one.first.flatten(), full, choice)  # the attention sink: its huge activations serve all
        return torch.where(one.valid.flatten(), choice, -1)

    def _held_setting(self, held: Held, device: torch.device) -> torch.Tensor:
        """[B], or [B * T] where each token has its own."""
        return torch.from_numpy(held.setting(self.layer)).to(device, torch.float32).flatten()

    def _report(self, held: Held, choice: torch.Tensor, shape: torch.Size) -> None:
        """Tell what tokens [B, T] saved that took the experts [B * T]."""
        widths = self.widths[choice.clamp(min=0)]
        saved = 3 * self.mlp.hidden_size * (self.sizes[-1] - widths) - self.router.num_weights
        by_token = torch.where(choice >= 0, saved, 0).view(shape)
        held.took(self.layer, by_token.cpu().numpy())

    def decide(self, scores: torch.Tensor, setting: torch.Tensor) -> torch.Tensor:
        """The choice for tokens with router scores [N, outputs] at native settings [N]; 0 is the full FFN."""
        if self.target == "class":
            return choose_by_confidence(scores, setting)
        choice = choose_by_damage(scores, setting, self.shares)
        return torch.where(setting <= 0, len(self.sizes) - 1, choice)

    # -- running

    def run(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """Tokens [N, D] through the chosen experts [N]."""
        if self.is_naive:
            return run_naive(x, choice, self.mlp, self.downs, self.sizes)
        if (y := gpu.run(x, choice, self.mlp, self.downs, self.sizes, self.execution)) is not None:
            return y
        if len(x) == 1 and (expert := int(choice)) >= 0:
            return run_one(x, self.mlp, self.downs, expert, self.sizes[expert])
        return run_grouped(x, choice, self.mlp, self.downs, self.sizes)

    def _bill(self, spending: Spending, one: Pass, choice: torch.Tensor | None, itemsize: int) -> None:
        meter, full = spending.meter, len(self.sizes) - 1
        is_routed = choice is not None and spending.override is None
        if choice is None:
            choice = torch.where(one.valid.flatten(), full, -1)
        if len(choice) == 1 and (expert := int(choice)) >= 0:  # a decode step: no need for tensors
            counts: torch.Tensor = self.one_hot[expert]
            channels: torch.Tensor | int = self.sizes[expert]
            used, num_tokens, num_channels = [expert], 1, self.sizes[expert]
        else:
            counts = torch.bincount(choice + 1, minlength=len(self.sizes) + 1)[1:]
            channels = torch.where(choice >= 0, self.widths[choice.clamp(min=0)], 0).view(one.valid.shape)
            used = counts.nonzero().flatten().tolist()
            num_tokens, num_channels = int(counts.sum()), int((counts * self.widths).sum())
        hidden_size = self.mlp.hidden_size
        down_widths = [self.sizes[e] for e in used] if len(self.downs) else [self.sizes[e] for e in used[-1:]]
        read = (2 * self.sizes[used[-1]] + sum(down_widths)) * hidden_size if used else 0
        weights = 3 * hidden_size * self.sizes[-1]
        own = sum(self.sizes[e] for e in used if e < full) if len(self.downs) else 0
        meter.add(
            "ffn",
            6 * hidden_size * num_channels,
            read * itemsize,
            2 * weights * num_tokens,
            weights * itemsize,
            own_bytes=own * hidden_size * itemsize,
        )
        if is_routed:
            router = self.router.num_weights
            meter.add("router", 2 * router * int(one.valid.sum()), router * itemsize, 0, 0)
        meter.widths(channels)
        meter.experts(self.layer, counts, self.widths)
