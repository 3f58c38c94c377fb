"""Where a run spent its compute: experts by layer, width by place in the window, and token by token on a passage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from rheostat.adapted import Adapted
from rheostat.meter import Meter
from rheostat.spending import current_pass, spend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_BINS = 32
"""Of positions, at most."""
DIGITS = 4
"""Of a share in a report: more would be noise, and a report has thousands of them."""


@dataclass
class Profile(Meter):
    """A meter that also adds up widths by layer and position. No row may have padding: a pass begins, for every row, at
    the position that the cache has come to."""

    position_channels: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> [T] int64, channels computed at each position, summed over rows and passes."""
    position_rows: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> [T] int64, how many tokens those were; none where an auxiliary read in the model's stead."""
    _newest: torch.Tensor | int = field(default=0, repr=False)
    """Widths whose layer is not known yet."""

    def open_pass(self, phase: str, valid: torch.Tensor, num_layers: int, ffn_size: int) -> None:
        """A forward pass begins on the tokens marked in `valid` [B, T]."""
        super().open_pass(phase, valid, num_layers, ffn_size)
        self._newest = 0

    def widths(self, channels: torch.Tensor | int) -> None:
        """FFN channels [B, T] that one layer computed; a routed layer calls `experts` right after."""
        super().widths(channels)
        self._newest = channels

    def experts(self, layer: int, counts: torch.Tensor, sizes: torch.Tensor) -> None:
        """How many tokens [E] took each expert of `layer`."""
        super().experts(layer, counts, sizes)
        if self.counts_widths and isinstance(self._newest, torch.Tensor):
            one = current_pass()
            start = one.past if one is not None else 0
            _add_at(self.position_channels, layer, start, self._newest.sum(0))
            _add_at(self.position_rows, layer, start, torch.full_like(self._newest[0], len(self._newest)))

    def use(self) -> dict[str, Any] | None:
        """Experts by layer and widths by position, as `report.json` holds them; None where nothing was routed, or
        where layers have other experts than their neighbours."""
        layers = sorted(self.expert_counts)
        sizes = [self._sizes[layer].tolist() for layer in layers]
        if not layers or any(one != sizes[0] for one in sizes):
            return None
        counts = [self.expert_counts[layer].double() for layer in layers]
        found: dict[str, Any] = {
            "widths": [size / self.ffn_size for size in sizes[0]],
            "shares": [_rounded(one / one.sum().clamp(min=1)) for one in counts],
        }
        if len(self.position_channels) == len(layers):
            found["positions"] = self._positions(layers)
        return found

    def _positions(self, layers: Sequence[int]) -> dict[str, Any]:
        length = len(self.position_channels[layers[0]])
        step = -(-length // NUM_BINS)
        starts = list(range(0, length, step))
        width = []
        for layer in layers:
            mean = self.position_channels[layer].double() / self.position_rows[layer].clamp(min=1)
            parts = (mean / self.ffn_size).split(step)
            width.append([round(float(part.mean()), DIGITS) for part in parts])
        return {"starts": starts, "width": width}


def _add_at(sums: dict[int, torch.Tensor], layer: int, start: int, new: torch.Tensor) -> None:
    """Add [T] to a layer's sums from the position `start` on; they grow where they are shorter."""
    old = sums.get(layer, new[:0])
    total = pad(old, (0, max(0, start + len(new) - len(old))))
    total[start : start + len(new)] += new
    sums[layer] = total


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


@torch.inference_mode()
def passage(
    adapted: Adapted, tokenizer: PreTrainedTokenizerBase, window: torch.Tensor, dials: Sequence[float], num_tokens: int
) -> dict[str, Any]:
    """The first `num_tokens` tokens of a window [T] as text, and what each cost at each of `dials`."""
    ids = window[:num_tokens]
    rows = []
    for compute in dials:
        with spend(compute) as meter:
            adapted(input_ids=ids[None].to(adapted.device), use_cache=False)
        widths = [round(width, DIGITS) for width in meter.token_fractions()]
        rows.append({"asked": compute, "compute": meter.compute, "widths": widths})
    tokens = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids.tolist()]
    return {"tokens": tokens, "rows": rows}
