"""`Runtime`: one model in one weight format, ready to run; and `Batch`: prompts being read and answers being written.

The forms of the weights are made when a phase first needs them: a prompt's first token does not wait for packing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rheostat.geometry import Geometry
from rheostat.kernels import NativeDecoder, library, reads_prompts
from rheostat.meter import Meter
from rheostat.runtime import packing, plain
from rheostat.runtime.billing import Biller, Tally
from rheostat.runtime.building import Unsupported, build, stamp
from rheostat.runtime.cache import KVCache
from rheostat.runtime.prefill import Prompt, prefill
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import DecoderWeights
from rheostat.spending import current_spending

AHEAD = 512
"""Tokens to write that a cache has room for at first, where more may come."""

Settings = Mapping[str, torch.Tensor]
"""Name -> native setting of each row [B]."""


class Runtime:
    """One model's weights in the forms that prefill and decode like."""

    def __init__(self, model: Any, format: str, hooks: frozenset[int] = frozenset()) -> None:
        """Look at the model; nothing is copied yet.

        Args:
            model: of `transformers`, with its methods attached.
            format: one of `kernels.FORMATS`.
            hooks: ids of hooks on the head that the caller answers for.

        Raises:
            Unsupported: the runtime cannot run this model, or not in this format.
        """
        self.weights = build(model, hooks)
        self.format = format
        for layer in self.weights.layers:
            packing.check_edges(layer.ffn.sizes, format)
        self.stamp = stamp(model, self.weights)
        self.itemsize = model.dtype.itemsize
        keys = {layer.ffn.router.key for layer in self.weights.layers if layer.ffn.router is not None}
        if len(keys) > 1:
            raise Unsupported(f"several dials ({', '.join(sorted(keys))})")
        self.key = next(iter(keys), None)
        self.rope = RopeTable(self.weights.inv_freq, self.weights.rope_scale)
        self.biller = Biller(self.weights, Geometry.from_config(model.config), self.itemsize)
        self.cache_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(format, torch.float16)
        self._lock = threading.Lock()
        self._decode: tuple[DecoderWeights, NativeDecoder | None] | None = None
        self._prefill: DecoderWeights | None = None

    def fits(self, model: Any, hooks: frozenset[int] = frozenset()) -> bool:
        """Whether the model is still what was looked at.

        Raises:
            Unsupported: it has become something that we cannot run.
        """
        return self.stamp == stamp(model, build(model, hooks))

    @property
    def decode_weights(self) -> DecoderWeights:
        """As decoding streams them; packed when first asked for."""
        return self._decoder()[0]

    def _decoder(self) -> tuple[DecoderWeights, NativeDecoder | None]:
        with self._lock:
            if self._decode is None:
                code = library()
                weights = packing.decode_form(self.weights, self.format, is_packed=code is not None)
                self._decode = weights, None if code is None else NativeDecoder(code, weights)
            return self._decode

    def prepare(self) -> None:
        """Make both forms of the weights now, so that no answer's clock has it in it."""
        self._decoder()
        _ = self.prefill_weights

    def step(
        self, token_ids: torch.Tensor, positions: torch.Tensor, cache: KVCache, settings: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One decode step, natively where that can be built: see `plain.step`."""
        weights, native = self._decoder()
        if native is None:
            return plain.step(weights, token_ids, positions, cache, settings, self.rope)
        return native(token_ids, positions, cache, settings, self.rope)

    @property
    def prefill_weights(self) -> DecoderWeights:
        """As a prompt is read with; converted when first asked for."""
        if self._prefill is None:
            code = library() if self.format != "fp32" else None
            is_native = code is not None and reads_prompts(code)
            shared = self._decoder()[0] if is_native and self.format == "bf16" else None
            with self._lock:
                if self._prefill is None and is_native and code is not None:
                    self._prefill = packing.native_prefill_form(self.weights, code, shared)
                elif self._prefill is None:
                    self._prefill = packing.prefill_form(self.weights, packing.prefill_dtype(self.format))
        return self._prefill

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held now beyond the model's own weights, by phase."""
        decode = None if self._decode is None else self._decode[0]
        others = [form for form in (self.weights, decode) if form is not None]
        return {
            "prefill": 0 if self._prefill is None else packing.own_bytes(self._prefill, *others),
            "decode": 0 if decode is None else packing.own_bytes(decode, self.weights),
        }

    def new_cache(self, num_rows: int, num_slots: int) -> KVCache:
        """An empty cache."""
        weights = self.weights
        return KVCache(
            num_layers=len(weights.layers),
            num_rows=num_rows,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            num_slots=num_slots,
            dtype=self.cache_dtype,
        )

    def setting(self, settings: Settings) -> torch.Tensor | None:
        """What the routers obey, [B] float32; None where all run dense."""
        found = settings.get(self.key) if self.key is not None else None
        return found.float() if found is not None and bool((found > 0).any()) else None


class Runtimes(dict[str, Runtime]):
    """Weight format -> the runtime in it. Left out when the model that has them is copied or pickled: they are made
    again, and native code cannot be."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtimes:
        return Runtimes()

    def __reduce__(self) -> tuple[type[Runtimes], tuple[()]]:
        return (Runtimes, ())


class Batch:
    """Prompts that were read, and their answers as far as they are written."""

    def __init__(self, runtime: Runtime, cache: KVCache, positions: torch.Tensor, logits: torch.Tensor) -> None:
        self.runtime, self.cache = runtime, cache
        self.positions = positions
        """[B] int64, of the next token."""
        self.logits = logits
        """[B, V] float32, for the next token."""
        self._tally = Tally()
        self._open: tuple[Meter, torch.Tensor, list[torch.Tensor | None]] | None = None

    @classmethod
    def read(
        cls,
        runtime: Runtime,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        settings: Settings,
        *,
        num_new: int = 0,
    ) -> Batch:
        """Read prompts [B, T]; padding, where the mask is 0, is left out. Bills the enclosing `spend`.

        Args:
            num_new: tokens that will be written, to have room for.
        """
        prompt = Prompt.of(input_ids, attention_mask)
        cache = runtime.new_cache(len(input_ids), max(prompt.lengths) + min(num_new, AHEAD))
        weights = runtime.prefill_weights
        hidden, experts = prefill(weights, prompt, cache, runtime.setting(settings), runtime.rope)
        logits = plain.product(weights.head, hidden)
        batch = cls(runtime, cache, torch.tensor(prompt.lengths), logits.float())
        if (spending := current_spending()) is not None:
            runtime.biller.prefill(spending.meter, batch._tally, prompt.valid, prompt.lengths, experts)
        return batch

    @classmethod
    def resume(
        cls,
        runtime: Runtime,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor,
        logits: torch.Tensor,
        *,
        num_new: int = 0,
    ) -> Batch:
        """Go on from keys and values [B, K, S, d] of each layer that somebody else filled, left-padded as the mask
        [B, S] says, and the next token's logits [B, V]."""
        lengths = attention_mask.long().sum(1)
        num_slots = attention_mask.shape[1]
        cache = runtime.new_cache(len(logits), num_slots + min(num_new, AHEAD))
        cache.fill(pairs, num_slots - lengths)
        return cls(runtime, cache, lengths, logits.float())

    def step(self, token_ids: torch.Tensor, settings: torch.Tensor | None) -> torch.Tensor:
        """Read the newest token [B] of each row at the native settings [B]; returns the next one's logits [B, V].

        What it cost is billed by `settle`, at the latest.
        """
        spending = current_spending()
        meter = None if spending is None else spending.meter
        if meter is not None and (self._open is None or self._open[0] is not meter):
            self.settle()
            self._open = (meter, self.positions.clone(), [])
        self.logits, experts = self.runtime.step(token_ids, self.positions, self.cache, settings)
        self.positions += 1
        if self._open is not None and meter is not None:
            self._open[2].append(experts)
        return self.logits

    def settle(self) -> None:
        """Bill the steps that were not billed yet."""
        if self._open is None:
            return
        (meter, pasts, chosen), self._open = self._open, None
        start = 0
        while start < len(chosen):  # runs of steps alike: with a router asked, or without
            stop = start + 1
            while stop < len(chosen) and (chosen[stop] is None) == (chosen[start] is None):
                stop += 1
            run = [one for one in chosen[start:stop] if one is not None]
            experts = torch.stack(run) if run else None
            self.runtime.biller.steps(meter, self._tally, pasts + start, experts, stop - start)
            start = stop


def keys_and_values(cache: Any, num_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [B, K, S, d] of every layer of a cache of `transformers` that holds `num_tokens` tokens a row.

    Raises:
        Unsupported: it holds something else.
    """
    pairs = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise Unsupported(f"a cache with layers of the kind {type(layer).__name__}")
        if layer.keys.shape[2] != num_tokens:
            raise Unsupported("a cache that dropped some of the prompt")
        pairs.append((layer.keys, layer.values))
    return pairs
