"""The bill of what the runtime did, to the last byte what the modules of an `Adapted` bill in `transformers`.

Steps are billed many at a time where nobody watches, and one by one in a stream; both through the same sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from rheostat.cost import (
    Cost,
    attended,
    attention_cost,
    attention_weight_bytes,
    embedding_cost,
    ffn_cost,
    head_cost,
    prediction_cost,
    rows_cost,
    seen,
)
from rheostat.geometry import Geometry
from rheostat.meter import PARTS, Meter
from rheostat.runtime.prefill import Prompt
from rheostat.runtime.weights import DecoderWeights, PredictedLayers


class Tally:
    """How many tokens took each expert, over the passes of one batch: rows of one tensor, so that a step adds to all
    at once. The meter holds the rows."""

    def __init__(self) -> None:
        self.totals = torch.zeros(0)
        self.views: list[torch.Tensor] = []


class Biller:
    """Bills passes of one model to a meter."""

    def __init__(self, weights: DecoderWeights, geometry: Geometry, itemsize: int) -> None:
        self.geometry, self.itemsize = geometry, itemsize
        self.routed = [place for place, layer in enumerate(weights.layers) if layer.ffn.router is not None]
        ffns = [weights.layers[place].ffn for place in self.routed]
        self.num_plain = len(weights.layers) - len(self.routed)
        most = max((len(ffn.sizes) for ffn in ffns), default=1)
        padded = [[*ffn.sizes, *[ffn.sizes[-1]] * (most - len(ffn.sizes))] for ffn in ffns]
        self.sizes = torch.tensor(padded, dtype=torch.int64).view(len(ffns), most)  # [R, E]
        self.full = torch.tensor([len(ffn.sizes) - 1 for ffn in ffns], dtype=torch.int64)  # [R]
        self.has_own_downs = torch.tensor([len(ffn.downs) > 1 for ffn in ffns], dtype=torch.bool)
        self.num_experts = [len(ffn.sizes) for ffn in ffns]
        self.full_sizes = [ffn.sizes[-1] for ffn in ffns]
        self.full_counts = torch.zeros_like(self.sizes).scatter_(1, self.full[:, None], 1)
        """[R, E], what a token that takes the full FFN adds to the experts' counts."""
        self.router_weights = [ffn.router.num_weights for ffn in ffns if ffn.router is not None]
        self._kinds = Counter(geometry.windows or (0,) * geometry.num_layers)
        fixed = attention_weight_bytes(geometry, itemsize) + ffn_cost(geometry, 0, self.num_plain, itemsize)
        per_pass = fixed + head_cost(geometry, 0, itemsize)
        per_token = (
            attention_cost(geometry, 1, 0, itemsize)
            + ffn_cost(geometry, 1, self.num_plain, 0)
            + embedding_cost(geometry, 1, itemsize)
            + head_cost(geometry, 1, 0)
        )
        self._rates = [_rates(part, per_pass, per_token) for part in PARTS]
        """Of each part that a step has: its name, FLOPs and bytes a pass, FLOPs and bytes a token."""

    def prefill(
        self,
        meter: Meter,
        tally: Tally,
        valid: torch.Tensor,
        lengths: Sequence[int],
        experts: Sequence[torch.Tensor] | None,
        pasts: Sequence[int] | None = None,
    ) -> None:
        """One pass over prompts that stood at `valid` [B, T], each after its past; experts of the packed tokens [N] for
        each routed layer, or None where all took the full FFN."""
        geometry, full = self.geometry, self.geometry.ffn_size
        meter.open_pass("prefill", valid, geometry.num_layers, full)
        num_tokens = sum(lengths)
        counts = zip(pasts or [0] * len(lengths), lengths, strict=True)
        cost = rows_cost(geometry, counts, self.num_plain, self.itemsize)
        meter.bill(cost + head_cost(geometry, len(lengths), self.itemsize))
        widths = torch.full((num_tokens,), full * self.num_plain)
        if self.routed:
            chosen = torch.stack(list(experts)) if experts else self.full[:, None].expand(-1, num_tokens)
            widths = widths + self._experts(meter, tally, chosen[None], is_routed=experts is not None)[0]
        channels = torch.zeros(valid.shape, dtype=torch.int64)
        channels[valid] = widths
        meter.widths(channels)

    def ahead(
        self, meter: Meter, tally: Tally, early: Prompt, maps: PredictedLayers, experts: Sequence[torch.Tensor] | None
    ) -> None:
        """One pass over prompts' early tokens, as an auxiliary of the first layers and maps for the others; experts of
        the packed tokens [N] for each routed layer of the auxiliary, or None where all took the full FFN.

        Billed as a pass of its own, as on `transformers`, though here the last tokens share its reading of weights.
        """
        geometry, itemsize, total = self.geometry, self.itemsize, sum(early.lengths)
        counts = list(zip(early.pasts, early.lengths, strict=True))
        routed = sum(place < maps.depth for place in self.routed)
        with meter.charging("auxiliary"):
            meter.open_pass("prefill", early.valid, geometry.num_layers, geometry.ffn_size)
            meter.bill(rows_cost(geometry.first_layers(maps.depth), counts, maps.depth - routed, itemsize))
            predicted = geometry.num_layers - maps.depth
            meter.bill(prediction_cost(geometry, predicted, maps.num_weights, total, itemsize))
            if routed:
                chosen = torch.stack(list(experts)) if experts else self.full[:routed, None].expand(-1, total)
                self._experts(meter, tally, chosen[None], is_routed=experts is not None)
        meter.spare("prefill", early.valid, rows_cost(geometry, counts, geometry.num_layers, itemsize))

    def steps(
        self, meter: Meter, tally: Tally, pasts: torch.Tensor, experts: torch.Tensor | None, num_steps: int
    ) -> None:
        """`num_steps` decode steps in a row.

        Args:
            pasts: [B] int64, tokens of each row before the first of them.
            experts: [n, L, B], or None where all took the full FFN.
        """
        num_rows, full = len(pasts), self.geometry.ffn_size
        first, valid = len(meter.passes), None
        if meter.counts_widths:
            valid = torch.ones(num_rows, 1, dtype=torch.bool)
            for _ in range(num_steps):
                meter.open_pass("decode", valid, self.geometry.num_layers, full)
        else:
            meter.side_tokens(num_steps * num_rows)
        self._flat(meter, num_steps, num_steps * num_rows)
        self._context(meter, ((num_steps, past) for past in pasts.tolist()))
        chosen = None if experts is None else experts[:, self.routed]
        widths = self._widths(meter, tally, chosen, num_steps, num_rows)
        if valid is None:
            return
        records = meter.passes[first:] if meter.keep_passes else meter.passes[-1:]
        rows = widths[-len(records) :] if isinstance(widths, torch.Tensor) else [widths] * len(records)
        for record, row in zip(records, rows, strict=True):
            record.ffn_channels += row if isinstance(row, int) else row[:, None]

    def check(
        self,
        meter: Meter,
        tally: Tally,
        pasts: Sequence[int],
        counts: Sequence[int],
        experts: torch.Tensor | None,
    ) -> None:
        """One pass over `counts` [B] new tokens after `pasts` [B] of each row, with logits after each.

        Args:
            experts: [L, N], or None where all took the full FFN.
        """
        geometry, num_tokens = self.geometry, sum(counts)
        is_whole = min(counts) == max(counts)
        shape = (len(counts), max(counts))
        valid = torch.ones(shape, dtype=torch.bool)
        if not is_whole:
            valid = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
        meter.open_pass("decode", valid, geometry.num_layers, geometry.ffn_size)
        self._flat(meter, 1, num_tokens)
        self._context(meter, zip(counts, pasts, strict=True), is_shared=True)
        chosen = None if experts is None else experts[None, self.routed]
        widths = self._widths(meter, tally, chosen, 1, num_tokens)
        if isinstance(widths, int):
            meter.widths(widths if is_whole else valid * widths)
            return
        channels = torch.zeros(shape, dtype=torch.int64)
        channels[valid] = widths[0]
        meter.widths(channels)

    def _flat(self, meter: Meter, num_passes: int, num_tokens: int) -> None:
        """What passes over so many tokens in all cost, as if each were its text's first."""
        for part, flops, num_bytes, token_flops, token_bytes in self._rates:
            flops = num_passes * flops + num_tokens * token_flops
            num_bytes = num_passes * num_bytes + num_tokens * token_bytes
            meter.add(part, flops, num_bytes, flops, num_bytes)

    def _context(self, meter: Meter, rows: Iterable[tuple[int, int]], *, is_shared: bool = False) -> None:
        """What attention costs beyond that of first tokens, which is billed already.

        Args:
            rows: (new tokens, cached before them) of each row.
            is_shared: the new tokens of a row come in one pass, which reads what they see once.
        """
        pairs = read = 0
        for new, past in rows:
            for window, number in self._kinds.items():
                more = number * (attended(new, past, window) - new)
                pairs += more
                read += number * (seen(new, past, window) - new) if is_shared else more
        flops = 4 * self.geometry.num_heads * self.geometry.head_dim * pairs
        num_bytes = read * self.geometry.kv_values * self.itemsize
        meter.add("scores", flops, num_bytes, flops, num_bytes)

    def _widths(
        self, meter: Meter, tally: Tally, chosen: torch.Tensor | None, num_passes: int, num_tokens: int
    ) -> torch.Tensor | int:
        """Bill experts [n, R, N] of n passes over N tokens each, or the full FFN in all of them where there are none.

        Returns:
            Channels over all layers [n, N]; one number where all tokens have the same.
        """
        plain = self.geometry.ffn_size * self.num_plain
        if not self.routed:
            return plain
        if chosen is not None:
            return plain + self._experts(meter, tally, chosen, is_routed=True)
        channels = sum(self.full_sizes)
        weights, total = 3 * self.geometry.hidden_size * channels, num_passes * num_tokens
        flops, num_bytes = 2 * weights * total, num_passes * weights * self.itemsize
        meter.add("ffn", flops, num_bytes, flops, num_bytes)
        self._count(meter, tally, self.full_counts * total)
        return plain + channels

    def _experts(self, meter: Meter, tally: Tally, chosen: torch.Tensor, *, is_routed: bool) -> torch.Tensor:
        """Bill experts [n, R, N] of n passes; returns the channels [n, N] over these routed layers: all, or the first
        R of them."""
        num_passes, num_layers, num_tokens = chosen.shape
        sizes, hidden_size, most = self.sizes[:num_layers], self.geometry.hidden_size, self.sizes.shape[1]
        channels = sizes.gather(1, chosen.transpose(0, 1).reshape(num_layers, -1))  # [R, n * N]
        counts = torch.zeros(num_passes, num_layers, most, dtype=torch.int64)
        counts.scatter_add_(2, chosen, torch.ones_like(chosen))
        used = (counts > 0) * sizes  # [n, R, E], widths of the experts that were taken
        widest = used.amax(2)
        read = 2 * widest + torch.where(self.has_own_downs[:num_layers], used.sum(2), widest)
        weights = 3 * hidden_size * int(sizes[:, -1].sum()) * num_passes
        meter.add(
            "ffn",
            6 * hidden_size * int(channels.sum()),
            int(read.sum()) * hidden_size * self.itemsize,
            2 * weights * num_tokens,
            weights * self.itemsize,
        )
        if is_routed:
            router = sum(self.router_weights[:num_layers]) * num_passes
            meter.add("router", 2 * router * num_tokens, router * self.itemsize, 0, 0)
        self._count(meter, tally, counts.sum(0))
        return channels.view(num_layers, num_passes, num_tokens).sum(0)

    def _count(self, meter: Meter, tally: Tally, counts: torch.Tensor) -> None:
        """Add experts [R, E] to the meter's."""
        if not meter.counts_widths:
            return
        held = [meter.expert_counts.get(place) for place in self.routed]
        if len(tally.views) != len(held) or any(a is not b for a, b in zip(held, tally.views, strict=True)):
            tally.totals = torch.zeros_like(self.sizes)
            tally.views = [row[:number] for row, number in zip(tally.totals, self.num_experts, strict=True)]
            for place, view, old, sizes in zip(self.routed, tally.views, held, self.sizes, strict=True):
                view += 0 if old is None else old
                meter.experts(place, torch.zeros_like(view), sizes[: len(view)])
                meter.expert_counts[place] = view
        tally.totals += counts


def _rates(part: str, per_pass: Cost, per_token: Cost) -> tuple[str, int, int, int, int]:
    pairs = [(getattr(cost.flops, part), getattr(cost.bytes, part)) for cost in (per_pass, per_token)]
    return (part, *pairs[0], *pairs[1])
