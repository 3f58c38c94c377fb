"""`Runtime`: one model in one weight format, ready to run; and `Batch`: prompts being read and answers being written.

The forms of the weights are made when a phase first needs them: a prompt's first token does not wait for packing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rheostat.caches.counting import saved_bytes
from rheostat.geometry import Geometry
from rheostat.kernels import NativeDecoder, library, reads_prompts
from rheostat.meter import Meter
from rheostat.runtime import packing, plain
from rheostat.runtime.ahead import Pieces, read_ahead
from rheostat.runtime.billing import Biller, Tally
from rheostat.runtime.building import Unsupported, build, stamp
from rheostat.runtime.cache import KVCache
from rheostat.runtime.plain import rms_norm
from rheostat.runtime.planes import PlaneCache, check_planes
from rheostat.runtime.prefill import Prompt, prefill, run_layers, set_lengths
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import CacheForm, DecoderWeights, DraftForm, PredictedLayers, ReadAhead
from rheostat.spending import current_spending

AHEAD = 512
"""Tokens to write that a cache has room for at first, where more may come."""

Settings = Mapping[str, torch.Tensor]
"""Name -> native setting of each row [B]."""


class Runtime:
    """One model's weights in the forms that prefill and decode like."""

    def __init__(
        self,
        model: Any,
        format: str,
        hooks: frozenset[int] = frozenset(),
        *,
        cache_form: CacheForm | None = None,
        draft_form: DraftForm | None = None,
        ahead: ReadAhead | None = None,
    ) -> None:
        """Look at the model; nothing is copied yet.

        Args:
            model: of `transformers`, with its methods attached.
            format: one of `kernels.FORMATS`.
            hooks: ids of hooks that the caller answers for.
            cache_form: of the cache of each batch; None is an ordinary one.
            draft_form: what a draft of the model itself reads; None where it has none.
            ahead: how prompts are read; None through all layers.

        Raises:
            Unsupported: the runtime cannot run this model, or not in this format.
        """
        self.ahead, self._hooks = ahead, hooks | (frozenset() if ahead is None else ahead.hook_ids)
        self.weights = build(model, self._hooks)
        self.format, self.cache_form, self.draft_form = format, cache_form, draft_form
        if cache_form is not None:
            check_planes(cache_form, self.weights)
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
        self._draft: tuple[DecoderWeights, NativeDecoder | None] | None = None
        self._maps: dict[int, PredictedLayers] = {}
        self._tails: dict[int, tuple[DecoderWeights, NativeDecoder | None]] = {}

    def fits(self, model: Any) -> bool:
        """Whether the model is still what was looked at.

        Raises:
            Unsupported: it has become something that we cannot run.
        """
        return self.stamp == stamp(model, build(model, self._hooks))

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

    def _drafter(self) -> tuple[DecoderWeights, NativeDecoder | None]:
        """The draft's own form; the decode form where it has none."""
        decode, _ = self._decoder()
        with self._lock:
            if self._draft is None and self.draft_form is not None:
                code = library()
                weights = packing.draft_form(self.weights, decode, self.draft_form, is_packed=code is not None)
                self._draft = weights, None if code is None else NativeDecoder(code, weights)
        return self._draft or self._decoder()

    def prepare(self, *, draft: bool = False) -> None:
        """Make the forms of the weights now, so that no answer's clock has it in it; the draft's where it is wanted."""
        self._decoder()
        _ = self.prefill_weights
        if draft:
            self._drafter()

    def step(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        settings: torch.Tensor | None,
        counts: Sequence[int] | None = None,
        *,
        is_draft: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One decode step, natively where that can be built: see `plain.step`. A draft reads the draft's weights; `out`
        [N, V] may take the logits."""
        weights, native = self._drafter() if is_draft else self._decoder()
        if native is None:
            return plain.step(weights, token_ids, positions, cache, settings, self.rope, counts)
        return native(token_ids, positions, cache, settings, self.rope, out, counts)

    def finish(
        self, depth: int, h: torch.Tensor, prompt: Prompt, cache: KVCache, setting: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Prompts' last tokens, whose residual stream is h [M, D], through the layers from `depth` on.

        Returns:
            The next tokens' logits [B, V] float32, and the experts [M] of each routed layer; None as for `prefill`.
        """
        if prompt.lengths == [1] * cache.num_rows:  # the form of decoding, which streams weights faster
            weights, native = self._tail(depth)
            if setting is not None:
                setting = setting.masked_fill(prompt.positions == 0, 0)  # first tokens of texts, as in `run_layers`
            last = (prompt.token_ids, prompt.positions, cache.above(depth), setting, self.rope)
            logits, experts = plain.step(weights, *last, hidden=h) if native is None else native(*last, hidden=h)
            routed = [place for place, layer in enumerate(weights.layers) if layer.ffn.router is not None]
            if experts is None and setting is not None:  # none but first tokens
                experts = torch.stack(
                    [torch.full_like(prompt.positions, len(one.ffn.sizes) - 1) for one in weights.layers]
                )
            return logits, None if experts is None else [experts[place] for place in routed]
        weights = self.prefill_weights
        chosen = run_layers(weights, range(depth, len(weights.layers)), h, prompt, cache, setting, self.rope)
        set_lengths(cache, prompt)
        hidden = rms_norm(h[prompt.lasts], weights.final_norm, weights.eps)
        return plain.product(self.prefill_weights.head, hidden).float(), chosen

    def _tail(self, depth: int) -> tuple[DecoderWeights, NativeDecoder | None]:
        """The layers from `depth` on as decoding streams them."""
        weights, native = self._decoder()
        with self._lock:
            if depth not in self._tails:
                tail = replace(weights, layers=weights.layers[depth:])
                code = None if native is None else library()
                self._tails[depth] = tail, None if code is None else NativeDecoder(code, tail)
            return self._tails[depth]

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

    def maps(self, depth: int) -> PredictedLayers:
        """What predicts the layers from `depth` on, in the dtype that prompts are read in."""
        assert self.ahead is not None
        reader = self.prefill_weights.reader
        with self._lock:
            if depth not in self._maps and reader is not None:
                self._maps[depth] = packing.native_ahead_form(self.ahead.layers[depth], reader)
            elif depth not in self._maps:
                self._maps[depth] = packing.ahead_form(self.ahead.layers[depth], packing.prefill_dtype(self.format))
            return self._maps[depth]

    def depths(self, settings: Settings, num_rows: int) -> dict[int | None, list[int]]:
        """The depth at which prompts are read, None for all layers -> the rows for which that is so."""
        asked = None if self.ahead is None else settings.get(self.ahead.key)
        if self.ahead is None or asked is None:
            return {None: list(range(num_rows))}
        found: dict[int | None, list[int]] = {}
        for row, setting in enumerate(asked.tolist()):
            found.setdefault(self.ahead.depth_at(setting), []).append(row)
        return found

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held now beyond the model's own weights, by phase."""
        decode, draft = (None if one is None else one[0] for one in (self._decode, self._draft))
        forms = {"decode": decode, "prefill": self._prefill, "draft": draft}
        held: dict[str, int] = {}
        counted = [self.weights]  # panels that two phases share are counted once
        for phase, form in forms.items():
            if form is not None or phase != "draft":
                held[phase] = 0 if form is None else packing.own_bytes(form, *counted)
            counted += [] if form is None else [form]
        if self.ahead is not None:
            own = (packing.ahead_bytes(one, self.ahead.layers[depth]) for depth, one in self._maps.items())
            held["prefill"] += sum(own)
        return held

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

    def body_savings(self, cache: KVCache, bits: int) -> int:
        """Bytes of a full cache that a pass over one in planes leaves unread, all layers and rows."""
        body = cache.body
        assert body is not None
        layers, _, heads, width = body.shape
        sizes = (body.group_size, body.value_group_size)
        rows = (saved_bytes(n, heads, width, sizes, bits, self.itemsize) for n in body.lengths.tolist())
        return layers * sum(rows)

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
        self._room = torch.empty(0, 0)
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
        logits = torch.empty(len(input_ids), runtime.weights.vocab_size)
        batch = cls(runtime, cache, torch.tensor(prompt.lengths), logits)
        for depth, rows in runtime.depths(settings, len(input_ids)).items():
            mask = prompt.valid[rows]
            one = prompt if len(rows) == len(input_ids) else Prompt.of(input_ids[rows], mask, rows=rows)
            setting = runtime.setting({key: value[rows] for key, value in settings.items()})
            logits[rows] = batch._read(one, depth, setting)
        batch._take_form(num_new)
        return batch

    def _read(self, prompt: Prompt, depth: int | None, setting: torch.Tensor | None) -> torch.Tensor:
        """Rows that are read alike; bills them, and returns the next token's logits [b, V]."""
        runtime, spending = self.runtime, current_spending()
        ahead = runtime.ahead
        if ahead is None or depth is None or prompt.valid.shape[1] <= ahead.num_exact:
            hidden, experts = prefill(runtime.prefill_weights, prompt, self.cache, setting, runtime.rope)
            if spending is not None:
                runtime.biller.prefill(spending.meter, self._tally, prompt.valid, prompt.lengths, experts)
            return plain.product(runtime.prefill_weights.head, hidden).float()
        pieces = Pieces.of(prompt, ahead.num_exact)
        maps, weights = runtime.maps(depth), runtime.prefill_weights
        h, below = read_ahead(weights, maps, prompt, pieces, self.cache, setting, runtime.rope)
        set_lengths(self.cache, pieces.early)
        logits, above = runtime.finish(depth, h, pieces.late, self.cache, setting)
        if spending is not None:
            early, late = pieces.split(below)
            runtime.biller.ahead(spending.meter, self._tally, pieces.early, maps, early)
            chosen = None if setting is None else [*(late or ()), *(above or ())]
            one = pieces.late
            runtime.biller.prefill(spending.meter, self._tally, one.valid, one.lengths, chosen, one.pasts)
        return logits

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
        batch = cls(runtime, cache, lengths, logits.float())
        batch._take_form(num_new)
        return batch

    def _take_form(self, num_new: int) -> None:
        """Put what was read into the cache that the runtime has to keep."""
        if (form := self.runtime.cache_form) is not None:
            room = int(self.positions.max()) + min(num_new, AHEAD)
            self.cache = PlaneCache.of(self.cache, form.group_size, form.value_group_size, room)

    def step(self, token_ids: torch.Tensor, settings: torch.Tensor | None) -> torch.Tensor:
        """Read the newest token [B] of each row at the native settings [B]; returns the next one's logits [B, V].

        What it cost is billed by `settle`, at the latest.
        """
        spending = current_spending()
        meter = None if spending is None else spending.meter
        if meter is not None and (self._open is None or self._open[0] is not meter):
            self.settle()
            self._open = (meter, self.positions.clone(), [])
        if self._open is not None and self.cache.body is not None:
            self._bill_body(spending.meter if spending is not None else None)
        self.logits, experts = self.runtime.step(token_ids, self.positions, self.cache, settings)
        self.cache.settle()
        self.positions += 1
        if self._open is not None and meter is not None:
            self._open[2].append(experts)
        return self.logits

    def check(
        self, token_ids: torch.Tensor, settings: torch.Tensor | None, counts: Sequence[int], *, is_draft: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read several tokens [N] a row, `counts` [B] of them, which may be taken back: nothing moves to a body yet.

        Bills nothing: whoever checks knows what for.

        Returns:
            Logits [N, V], valid until the next call, and the experts [L, N] that were taken, if any were chosen.
        """
        number = torch.tensor(counts)
        ends = number.cumsum(0)
        firsts = (self.positions - (ends - number)).repeat_interleave(number)
        given = None if settings is None else settings.repeat_interleave(number)
        positions = firsts + torch.arange(len(token_ids))
        if len(self._room) < len(token_ids):  # kept: fresh memory of this size costs milliseconds on some machines
            self._room = torch.empty(len(token_ids), self.runtime.weights.vocab_size)
        out = self._room[: len(token_ids)]
        logits, experts = self.runtime.step(token_ids, positions, self.cache, given, counts, is_draft=is_draft, out=out)
        self.positions += number
        return logits, experts

    def take_back(self, numbers: torch.Tensor) -> None:
        """Forget the newest tokens of each row, [B] of them."""
        self.cache.truncate(self.cache.lengths - numbers.int())
        self.positions -= numbers

    @property
    def tally(self) -> Tally:
        """What the meter holds of this batch."""
        return self._tally

    def _bill_body(self, meter: Meter | None) -> None:
        if meter is not None:
            meter.add("scores", 0, -self.runtime.body_savings(self.cache, 8), 0, 0)

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
