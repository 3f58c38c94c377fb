"""Reading a prompt ahead: all tokens through the first layers only, the other layers' keys and values predicted from
what they left in the residual stream, and the last tokens alone through the rest.

One pass, straight into the cache. Shapes: N tokens of all rows, M of them last ones; L layers, X features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from rheostat.runtime.cache import KVCache
from rheostat.runtime.plain import dense, rms_norm
from rheostat.runtime.prefill import Prompt, embed, linear, run_layers
from rheostat.runtime.rope import RopeTable, rotate
from rheostat.runtime.weights import DecoderWeights, PredictedLayers


@dataclass(frozen=True)
class Pieces:
    """A prompt in two: the tokens that are read ahead, and each row's last ones."""

    early: Prompt
    """Rows may have no token in it."""
    late: Prompt
    is_late: torch.Tensor
    """[N] bool."""

    @classmethod
    def of(cls, prompt: Prompt, num_late: int) -> Pieces:
        """Cut off the last `num_late` tokens of each row, or all there are."""
        lates = [min(length, num_late) for length in prompt.lengths]
        earlies = [length - late for length, late in zip(prompt.lengths, lates, strict=True)]
        counts = torch.tensor([earlies, lates]).T.flatten()
        is_late = torch.tensor([False, True]).repeat(len(lates)).repeat_interleave(counts)
        cut = prompt.valid.shape[1] - num_late
        middles = [past + early for past, early in zip(prompt.pasts, earlies, strict=True)]
        parts = (
            (~is_late, earlies, prompt.valid[:, :cut], prompt.pasts),
            (is_late, lates, prompt.valid[:, cut:], middles),
        )
        early, late = (
            Prompt(prompt.token_ids[mine], prompt.positions[mine], lengths, valid, prompt.rows, pasts)
            for mine, lengths, valid, pasts in parts
        )
        return cls(early, late, is_late)

    def split(
        self, values: list[torch.Tensor] | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]] | tuple[None, None]:
        """Of something of all tokens [N], the early tokens' part and the late ones'."""
        if values is None:
            return None, None
        return [one[~self.is_late] for one in values], [one[self.is_late] for one in values]


def read_ahead(
    weights: DecoderWeights,
    maps: PredictedLayers,
    prompt: Prompt,
    pieces: Pieces,
    cache: KVCache,
    settings: torch.Tensor | None,
    rope: RopeTable,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Read prompts through the layers below the depth and predict what the others cache.

    Args:
        weights: as for `prefill.prefill`.
        maps: with matrices in the dtype to compute in.
        pieces: of the prompt; of the late ones nothing is written from the depth on.
        cache: has the prompt's rows; its lengths stay as they are.
        settings: [B] float32, for the routers, as for `prefill.prefill`.

    Returns:
        The residual stream [M, D] of the late tokens where it enters the depth, and the experts [N] of each routed
        layer below; None where no router was asked.
    """
    cache.reserve(max(prompt.ends))
    h = embed(weights, prompt)
    if maps.reader is not None:
        chosen: list[torch.Tensor] | None = maps.reader(
            h, prompt, ~pieces.is_late, before(prompt), cache, settings, rope
        )
        return h[pieces.is_late], chosen
    read: dict[int, torch.Tensor] = {}
    experts: list[torch.Tensor] = []
    for start, stop in pairwise([*sorted({0, *maps.reads, *maps.previous, maps.depth}), maps.depth]):
        x = rms_norm(h, weights.layers[start].input_norm, weights.eps)
        read[start] = x.to(dense(maps.maps[0]).dtype)
        experts += run_layers(weights, range(start, stop), h, prompt, cache, settings, rope) or []
    befores = before(prompt)
    features = [read[layer] for layer in maps.reads] + [read[layer][befores] for layer in maps.previous]
    _predict(weights, maps, torch.cat(features, -1), prompt, pieces, cache, rope)
    return h[pieces.is_late], experts or None


def before(prompt: Prompt) -> torch.Tensor:
    """[N], where the token before each is among the packed; itself where that is a text's first, or not among them."""
    places = torch.arange(len(prompt.positions))
    starts = prompt.lasts + 1 - torch.tensor(prompt.lengths)
    is_odd = prompt.positions <= 1
    is_odd[starts[torch.tensor(prompt.lengths) > 0]] = True
    return torch.where(is_odd, places, places - 1)


def _predict(
    weights: DecoderWeights,
    maps: PredictedLayers,
    features: torch.Tensor,
    prompt: Prompt,
    pieces: Pieces,
    cache: KVCache,
    rope: RopeTable,
) -> None:
    """Write the early tokens' keys and values from the depth on, from features [N, X] of all tokens: leaving out the
    late ones would copy more than it saves."""
    mixed = features if maps.squeeze is None else linear(features, dense(maps.squeeze))  # [N, R]
    parts = [linear(mixed, dense(one), bias) for one, bias in zip(maps.maps, maps.biases, strict=True)]
    both = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    both[prompt.firsts] = torch.cat(maps.firsts).to(both.dtype)
    layers = weights.layers[maps.depth :]
    both = both.view(len(both), len(layers), 2, -1, weights.head_dim)
    keys, values = both.unbind(2)  # [N, L - depth, K, d]
    norms = [layer.k_norm for layer in layers if layer.k_norm is not None]
    if norms:
        keys = rms_norm(keys, torch.stack(norms)[:, None], weights.eps)
    rotated = rotate(keys.flatten(1, 2)[None], *(one[None] for one in rope.at(prompt.positions))).view_as(keys)
    is_rotated = torch.tensor([layer.has_rope for layer in layers])
    keys = rotated if bool(is_rotated.all()) else torch.where(is_rotated[:, None, None], rotated, keys)
    start, early = 0, pieces.early
    for row, past, end, length in zip(early.rows, early.pasts, early.ends, prompt.lengths, strict=True):
        mine = slice(start, start + end - past)
        cache.keys[maps.depth :, row, :, past:end] = keys[mine].permute(1, 2, 0, 3)
        cache.values[maps.depth :, row, :, past:end] = values[mine].permute(1, 2, 0, 3)
        start += length
