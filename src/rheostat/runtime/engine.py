"""`Runtime`: one model in one weight format, ready to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rheostat.caches.counting import saved_bytes
from rheostat.geometry import Geometry
from rheostat.runtime import packing, plain
from rheostat.runtime.billing import Biller
from rheostat.runtime.building import Unsupported, build, stamp
from rheostat.runtime.cache import KVCache
from rheostat.runtime.forms import Forms
from rheostat.runtime.plain import rms_norm
from rheostat.runtime.planes import check_planes
from rheostat.runtime.prefill import Prompt, run_layers, saved_weights, set_lengths
from rheostat.runtime.rope import RopeTable
from rheostat.runtime.weights import CacheForm, DecoderWeights, DraftForm, PredictedLayers, ReadAhead

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
        self._saved: list[list[int]] = []
        """Of each layer: weights that a token leaves out with each expert."""
        self.forms = Forms(self.weights, format, draft_form, ahead)

    def fits(self, model: Any) -> bool:
        """Whether the model is still what was looked at.

        Raises:
            Unsupported: it has become something that we cannot run.
        """
        return self.stamp == stamp(model, build(model, self._hooks))

    @property
    def decode_weights(self) -> DecoderWeights:
        """As decoding streams them; packed when first asked for."""
        return self.forms.decode().weights

    @property
    def prefill_weights(self) -> DecoderWeights:
        """As a prompt is read with; converted when first asked for."""
        return self.forms.prefill()

    def prepare(self, *, decode: bool = True, draft: bool = False) -> None:
        """Make the forms of the weights now, so that no answer's clock has it in it: the draft's where it is wanted,
        the one for decoding unless it can wait."""
        if decode:
            self.forms.decode()
        self.forms.prefill()
        if draft:
            self.forms.draft()

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
        form = self.forms.draft() if is_draft else self.forms.decode()
        return form.step(token_ids, positions, cache, settings, self.rope, out=out, counts=counts)

    def write(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        settings: torch.Tensor | None,
        counts: Sequence[int],
        number: int,
        *,
        is_draft: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Several greedy steps in a row: see `StepForm.write`."""
        form = self.forms.draft() if is_draft else self.forms.decode()
        return form.write(token_ids, positions, cache, settings, self.rope, number, out=out, counts=counts)

    def finish(
        self, depth: int, h: torch.Tensor, prompt: Prompt, cache: KVCache, setting: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Prompts' last tokens, whose residual stream is h [M, D], through the layers from `depth` on.

        Returns:
            The next tokens' logits [B, V] float32, and the experts [M] of each routed layer; None as for `prefill`.
        """
        if prompt.lengths == [1] * cache.num_rows:  # the form of decoding, which streams weights faster
            return self._finish_as_step(depth, h, prompt, cache, setting)
        weights = self.prefill_weights
        chosen = run_layers(weights, range(depth, len(weights.layers)), h, prompt, cache, setting, self.rope)
        set_lengths(cache, prompt)
        hidden = rms_norm(h[prompt.lasts], weights.final_norm, weights.eps)
        return plain.product(weights.head, hidden).float(), chosen

    def _finish_as_step(
        self, depth: int, h: torch.Tensor, prompt: Prompt, cache: KVCache, setting: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """`finish` for one token a row."""
        tail, layers = self.forms.tail(depth), self.weights.layers[depth:]
        if setting is not None:
            setting = setting.masked_fill(prompt.positions == 0, 0)  # first tokens of texts, as in `run_layers`
        upper = cache.above(depth)
        logits, experts = tail.step(prompt.token_ids, prompt.positions, upper, setting, self.rope, hidden=h)
        if experts is None and setting is not None:  # none but first tokens
            experts = torch.stack([torch.full_like(prompt.positions, len(one.ffn.sizes) - 1) for one in layers])
        routed = [place for place, layer in enumerate(layers) if layer.ffn.router is not None]
        return logits, None if experts is None else [experts[place] for place in routed]

    def maps(self, depth: int) -> PredictedLayers:
        """What predicts the layers from `depth` on, in the dtype that prompts are read in."""
        return self.forms.maps(depth)

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
        return self.forms.nbytes

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

    def saved(self, experts: torch.Tensor) -> list[int]:
        """[B], the weights that tokens left out with the experts [L, B]."""
        if not self._saved:
            ffns = [layer.ffn for layer in self.weights.layers]
            self._saved = [[0] * len(one.sizes) if one.router is None else saved_weights(one).tolist() for one in ffns]
        # Plain numbers: between two steps the weights have put the code of numpy out of the processor's caches.
        rows: list[list[int]] = experts.T.tolist()
        return [sum(saved[expert] for saved, expert in zip(self._saved, row, strict=True)) for row in rows]

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
