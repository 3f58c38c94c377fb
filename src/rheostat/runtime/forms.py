"""`Forms`: one model's weights as each phase likes to read them, made when a phase first needs them.

A prompt's first token does not wait for the packing that decoding wants.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from rheostat.kernels import NativeDecoder, library, reads_prompts
from rheostat.runtime import packing, plain
from rheostat.runtime.cache import KVCache
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import DecoderWeights, DraftForm, PredictedLayers, ReadAhead
from rheostat.sampling import most_likely


class StepForm(NamedTuple):
    """Weights as a decode step streams them."""

    weights: DecoderWeights
    native: NativeDecoder | None
    """The step over them in native code; None where that cannot be built."""

    @classmethod
    def of(cls, weights: DecoderWeights, *, is_native: bool) -> StepForm:
        """With native code for matrices that are packed for it."""
        code = library() if is_native else None
        return cls(weights, None if code is None else NativeDecoder(code, weights))

    def step(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        settings: torch.Tensor | None,
        rope: RopeTable,
        *,
        out: torch.Tensor | None = None,
        counts: Sequence[int] | None = None,
        hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `plain.step`; `out` [N, V] may take the logits of native code."""
        if self.native is None:
            return plain.step(self.weights, token_ids, positions, cache, settings, rope, counts, hidden)
        return self.native(token_ids, positions, cache, settings, rope, out, counts, hidden)

    def write(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        settings: torch.Tensor | None,
        rope: RopeTable,
        number: int,
        *,
        out: torch.Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`number` steps in a row, each after the first on the most likely tokens of the one before.

        Returns:
            Those tokens [n, N], and the experts [n, L, N] as for `plain.step`.
        """
        if self.native is not None and self.native.can_draft:
            drafted = torch.empty(number, len(token_ids), dtype=torch.int64)
            experts = self.native(token_ids, positions, cache, settings, rope, out, counts, drafted=drafted)[1]
            return drafted, experts
        found, chosen = [], []
        for i in range(number):
            logits, experts = self.step(token_ids, positions + i, cache, settings, rope, out=out, counts=counts)
            token_ids = most_likely(logits)
            found.append(token_ids)
            chosen += [] if experts is None else [experts]
        return torch.stack(found), torch.stack(chosen) if chosen else None


class Forms:
    """The forms of one decoder's weights; the matrices that two phases can share are held once."""

    def __init__(
        self, weights: DecoderWeights, format: str, draft_form: DraftForm | None, ahead: ReadAhead | None
    ) -> None:
        """Nothing is made yet.

        Args:
            weights: views of the model's own parameters.
            format: one of `kernels.FORMATS`, of the matrices that decoding streams.
            draft_form: what a draft of the model itself reads; None where it reads what decoding reads.
            ahead: how prompts are read; None through all layers.
        """
        self.weights, self.format, self.draft_form, self.ahead = weights, format, draft_form, ahead
        self._lock = threading.Lock()
        self._decode: StepForm | None = None
        self._draft: StepForm | None = None
        self._tails: dict[int, StepForm] = {}
        self._prefill: DecoderWeights | None = None
        self._maps: dict[int, PredictedLayers] = {}

    def decode(self) -> StepForm:
        """What decoding streams."""
        with self._lock:
            if self._decode is None:
                is_native = library() is not None
                weights = packing.decode_form(self.weights, self.format, is_packed=is_native)
                self._decode = StepForm.of(weights, is_native=is_native)
            return self._decode

    def draft(self) -> StepForm:
        """What a draft streams; what decoding does where it has no form of its own."""
        decode = self.decode()
        with self._lock:
            if self._draft is None and self.draft_form is not None:
                is_native = library() is not None
                weights = packing.draft_form(self.weights, decode.weights, self.draft_form, is_packed=is_native)
                self._draft = StepForm.of(weights, is_native=is_native)
            return self._draft or decode

    def tail(self, depth: int) -> StepForm:
        """The layers from `depth` on as decoding streams them."""
        weights, native = self.decode()
        with self._lock:
            if depth not in self._tails:
                upper = replace(weights, layers=weights.layers[depth:])
                self._tails[depth] = StepForm.of(upper, is_native=native is not None)
            return self._tails[depth]

    def prefill(self) -> DecoderWeights:
        """What a prompt is read with."""
        if self._prefill is None:
            code = library() if self.format != "fp32" else None
            is_native = code is not None and reads_prompts(code)
            shared = self.decode().weights if is_native and self.format == "bf16" else None
            with self._lock:
                if self._prefill is None and is_native and code is not None:
                    self._prefill = packing.native_prefill_form(self.weights, code, shared)
                elif self._prefill is None:
                    self._prefill = packing.prefill_form(self.weights, packing.prefill_dtype(self.format))
        return self._prefill

    def maps(self, depth: int) -> PredictedLayers:
        """What predicts the layers from `depth` on, in the dtype that prompts are read in."""
        assert self.ahead is not None
        layers, reader = self.ahead.layers[depth], self.prefill().reader
        with self._lock:
            if depth not in self._maps and reader is not None:
                self._maps[depth] = packing.native_ahead_form(layers, reader)
            elif depth not in self._maps:
                self._maps[depth] = packing.ahead_form(layers, packing.prefill_dtype(self.format))
            return self._maps[depth]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held now beyond the model's own weights, by phase; panels that two phases share are the first one's."""
        decode, draft = (None if form is None else form.weights for form in (self._decode, self._draft))
        held: dict[str, int] = {}
        counted = [self.weights]
        for phase, weights in {"decode": decode, "prefill": self._prefill, "draft": draft}.items():
            if weights is not None or phase != "draft":
                held[phase] = 0 if weights is None else packing.own_bytes(weights, *counted)
            counted += [] if weights is None else [weights]
        if self.ahead is not None:
            own = (packing.ahead_bytes(one, self.ahead.layers[depth]) for depth, one in self._maps.items())
            held["prefill"] += sum(own)
        return held
