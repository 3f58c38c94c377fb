"""Reading prompts in one native call: all tokens of a batch through a range of layers, in bfloat16."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels import structs
from rheostat.kernels.embedding import can_look_up, look_up
from rheostat.kernels.layers import describe_layer
from rheostat.kernels.packed import CMatrix

AVX512 = 2
"""What `rheostat_level` calls that level."""


@dataclass(frozen=True)
class Call:
    """What one call hands to native code, and what it brings back."""

    decoder: structs.CDecoder
    reading: structs.CReading
    experts: torch.Tensor | None
    """[L, N] int32; None where no router is asked."""
    routed: list[int]
    """The layers that have a router."""
    alive: tuple[Any, ...]
    """What the structures point at."""

    def chosen(self) -> list[torch.Tensor] | None:
        """Experts [N] int64 of each routed layer; None where no router was asked."""
        return None if self.experts is None else [self.experts[place].long() for place in self.routed]


class NativeReader:
    """A decoder's layers for prompts; called like its plain twin, `rheostat.runtime.prefill.run_layers`.

    Several threads may call it at once, each with a cache of its own.
    """

    def __init__(self, library: ctypes.CDLL, weights: Any) -> None:
        """Describe the weights to the native code; nothing large is copied.

        Args:
            weights: a `rheostat.runtime.weights.DecoderWeights` whose layers' matrices are packed as bf16.

        Raises:
            SettingError: something that the native code cannot do.
        """
        self.library, self._weights, self._keep = library, weights, structs.Keep()
        self._attention = (weights.num_heads, weights.num_kv_heads, weights.head_dim)
        structs.check_attention(*self._attention, torch.float32)
        layers = [describe_layer(self._keep, layer, weights.activation) for layer in weights.layers]
        for layer in weights.layers:
            ffn = layer.ffn
            formats = {one.format for one in (layer.q, layer.k, layer.v, layer.o, ffn.gate, ffn.up, *ffn.downs)}
            if formats != {"bf16"}:
                raise bad_setting("weights", sorted(formats), "bf16")
        self._shape = {
            "layers": self._keep.array(structs.CLayer, layers),
            "num_layers": len(layers),
            "hidden_size": weights.hidden_size,
            "rope_half": len(weights.inv_freq),
            "eps": weights.eps,
            "final_norm": None,
            "head": CMatrix(),
        }

    def __call__(
        self, layers: range, h: torch.Tensor, prompt: Any, cache: Any, settings: torch.Tensor | None, rope: Any
    ) -> list[torch.Tensor] | None:
        """Some layers on tokens whose residual stream is h [N, D] float32, which is changed in place.

        Args:
            layers: which, without gaps.
            prompt: a `rheostat.runtime.prefill.Prompt`.
            cache: a `rheostat.runtime.cache.KVCache`; the layers' keys and values are written after each row's past.
            settings: [B] float32, native settings; None, or 0 in a row, is the full FFN.
            rope: a `rheostat.runtime.rope.RopeTable` of these weights.

        Returns:
            Experts [N] int64 of each routed layer among these; None where no router was asked.

        Raises:
            SettingError: the tokens do not fit the cache or the decoder.
        """
        if not len(layers) or not len(h):
            return None
        call = self.prepare(layers, h, prompt, cache, settings, rope)
        self.library.rheostat_read_prompts(
            ctypes.byref(call.decoder), ctypes.byref(call.reading), torch.get_num_threads()
        )
        return call.chosen()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream [N, D] float32 that enters the first layer.

        Raises:
            SettingError: ids [N] that the embedding does not have.
        """
        table = self._weights.embedding
        if not isinstance(table, torch.Tensor) or not can_look_up(table):
            found = table.rows(token_ids) if not isinstance(table, torch.Tensor) else table[token_ids].float()
            return found
        ids = token_ids.long().contiguous()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
            raise bad_setting("token_ids", [int(ids.min()), int(ids.max())], f"from 0 to {len(table) - 1}")
        return look_up(self.library, table, ids, torch.empty(len(ids), table.shape[1]))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Layers, width D, and 2 K d: keys and values of one token in one layer."""
        _, num_kv_heads, head_dim = self._attention
        return len(self._weights.layers), self._weights.hidden_size, 2 * num_kv_heads * head_dim

    def prepare(
        self, layers: range, h: torch.Tensor, prompt: Any, cache: Any, settings: torch.Tensor | None, rope: Any
    ) -> Call:
        """What native code is given for `layers`; arguments and errors are those of a call."""
        self._check(layers, h, prompt, cache)
        cache.reserve(max(prompt.ends))
        table = rope.reserve(max(prompt.ends))
        routed = [place for place in layers if self._weights.layers[place].ffn.router is not None]
        is_routed = bool(routed) and settings is not None and bool((settings > 0).any())
        lengths, pasts, rows = (
            torch.tensor(one, dtype=torch.int32) for one in (prompt.lengths, prompt.pasts, prompt.rows)
        )
        by_token = prompt.by_token(settings.float()) if is_routed and settings is not None else None
        experts = torch.empty(layers.stop, len(h), dtype=torch.int32) if is_routed else None
        positions = prompt.positions.contiguous()
        heads = structs.CAttention(
            *self._attention, structs.CACHE_DTYPES[cache.dtype], cache.num_slots, self._weights.attention_scale, 0.0
        )
        decoder = structs.CDecoder(**self._shape, attention=heads)
        held = (h, positions, by_token, lengths, pasts, rows, cache.keys, cache.values)
        before, after = (
            [None if one is None else one.data_ptr() for one in group] for group in (held, (*table, experts))
        )
        numbers = (len(lengths), len(h), layers.start, layers.stop)
        reading = structs.CReading(*before, cache.keys.stride(0), *after, *numbers)
        return Call(decoder, reading, experts, routed, (*held, table))

    def _check(self, layers: range, h: torch.Tensor, prompt: Any, cache: Any) -> None:
        weights, held = self._weights, cache.keys.shape
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= len(weights.layers):
            raise bad_setting("layers", layers, f"a range within {len(weights.layers)} layers")
        fits = h.shape == (sum(prompt.lengths), weights.hidden_size) and h.dtype == torch.float32
        if not fits or not h.is_contiguous() or h.device.type != "cpu":
            raise bad_setting(
                "h", f"{h.dtype} {tuple(h.shape)}", f"float32 [tokens, {weights.hidden_size}], contiguous"
            )
        shape = (len(weights.layers), held[1], weights.num_kv_heads, held[3], weights.head_dim)
        if tuple(held) != shape or cache.dtype not in structs.CACHE_DTYPES:
            raise bad_setting("cache", f"{cache.dtype} {tuple(held)}", f"of shape {shape}")
        for one in (cache.keys, cache.values):  # rows that are kept free after each layer's are fine, nothing else
            if not one[0].is_contiguous() or one.stride(0) != cache.keys.stride(0):
                raise bad_setting("cache", one.stride(), "dense in each layer")
        if any(not 0 <= row < held[1] for row in prompt.rows):
            raise bad_setting("rows", prompt.rows, f"rows of a cache that has {held[1]}")


def reads_prompts(library: ctypes.CDLL) -> bool:
    """Whether the native code is faster at prompts than torch: where the processor multiplies bfloat16."""
    return bool(library.rheostat_level() == AVX512)
