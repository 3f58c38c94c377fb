"""What requests of lm-eval took: tokens and cost by the meter, how they were answered, how many were cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from rheostat.meter import PARTS, Meter
from rheostat.processes import Ranks

Override = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, x [N, D]) -> expert [N]."""


@dataclass
class Account:
    """What the requests since `DialLM.open` took, over all processes once `close` has been called."""

    compute: float
    override: Override | None = None
    """In the place of the routers' choice, for baselines (`rheostat.spend`)."""
    meter: Meter = field(default_factory=lambda: Meter(keep_passes=False))
    modes: set[str] = field(default_factory=set)
    """How requests were answered: `prefill+score`, `prefill+steps`, `forward`, `generate`."""
    num_requests: int = 0
    num_truncated: int = 0
    """Requests whose context was cut on the left, because the model cannot read it whole."""
    num_unended: int = 0
    """Answers that the limit of tokens ended."""

    def over_all(self, ranks: Ranks) -> Account:
        """The same account, its meter with what all processes spent."""
        meter = self.meter
        spent = ranks.gather(
            (meter.cost, meter.dense, meter.num_prefill_tokens, meter.num_decode_tokens, meter.expert_counts)
        )
        total = Meter(keep_passes=False, started=meter.started)
        for cost, dense, num_prefill_tokens, num_decode_tokens, counts_by_layer in spent:
            for layer, found in counts_by_layer.items():
                total.expert_counts[layer] = total.expert_counts.get(layer, 0) + found
            for part in PARTS:
                counts = [getattr(getattr(one, unit), part) for one in (cost, dense) for unit in ("flops", "bytes")]
                total.add(part, *counts)
            total.num_prefill_tokens += num_prefill_tokens
            total.num_decode_tokens += num_decode_tokens
        return replace(self, meter=total)
