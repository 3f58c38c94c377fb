"""Our own runtime as a side, in one weight format at one setting of the dial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from rheostat.adapted import Adapted
from rheostat.bench.sides import Side, SideSpec, Spent
from rheostat.cost import Cost, Parts
from rheostat.runtime.batch import Batch
from rheostat.runtime.engine import Runtime
from rheostat.runtime.packing import check_format, prefill_dtype
from rheostat.runtime.weights import DecoderWeights, Matrix
from rheostat.sampling import most_likely
from rheostat.spending import Compute, Spending, current_spending, spend


class NativeSide(Side):
    """A batch on the runtime, with greedy choice and the meter running, as in use."""

    def __init__(self, spec: SideSpec, adapted: Adapted, runtime: Runtime | None = None) -> None:
        """Pack the weights.

        Args:
            runtime: of this model in this format, where there is one already.

        Raises:
            Unsupported: the runtime cannot run this model in this format.
        """
        format = check_format(spec.weights, adapted.dtype)
        self.runtime = runtime or adapted.new_runtime(format)
        self.adapted = adapted
        self.compute: Compute = spec.compute
        """What is asked; may be set to one number a row."""
        self.spec = replace(spec, weights=format, dtype=str(prefill_dtype(format)).removeprefix("torch."))
        self._asked: Spending | None = None
        self._setting: torch.Tensor | None = None
        self._batch: Batch | None = None
        assert self.runtime.decode_weights is not None, "packing is not to be timed"
        assert self.runtime.prefill_weights is not None

    @contextmanager
    def session(self) -> Iterator[None]:
        """No gradients, and the dial's setting."""
        with torch.inference_mode(), spend(self.compute, keep_passes=False):
            yield

    def prefill(self, ids: torch.Tensor) -> Any:
        """One pass over the prompts [B, T]."""
        settings = self.adapted.settings("prefill", len(ids))
        self._batch = batch = Batch.read(self.runtime, ids, None, settings, num_new=self.spec.context)
        return batch, most_likely(batch.logits)

    def decode(self, state: Any) -> Any:
        """One pass over one token a row."""
        batch, token_ids = state
        if (asked := current_spending()) is not self._asked:
            self._setting = self.runtime.setting(self.adapted.settings("decode", len(token_ids)))
            self._asked = asked
        return batch, most_likely(batch.step(token_ids, self._setting))

    def wait(self) -> None:
        """Nothing runs on, but the bill is due: for all steps at once, as `generate` does it."""
        if self._batch is not None:
            self._batch.settle()

    def spent(self, ids: torch.Tensor, num_steps: int) -> Spent:
        """By the meter, with the bytes of the forms that the weights really have."""
        with torch.inference_mode():
            with spend(self.compute, keep_passes=False) as prefill:
                state = self.prefill(ids)
            with spend(self.compute, keep_passes=False) as decode:
                for _ in range(num_steps):
                    state = self.decode(state)
                self.wait()
        used, dense = prefill.cost + decode.cost, prefill.dense + decode.dense
        runtime = self.runtime
        return Spent(
            self._held(prefill.cost, runtime.prefill_weights),
            self._held(decode.cost, runtime.decode_weights),
            num_steps,
            used.flops.flat / dense.flops.flat,
            decode.speculation.to_dict() if decode.speculation.num_rounds else None,
        )

    def _held(self, cost: Cost, form: DecoderWeights) -> Cost:
        """`cost`, whose bytes are those of the model's dtype, with the bytes of `form` and of our cache."""
        itemsize = self.runtime.itemsize
        plain, layers = self.runtime.weights, range(len(form.layers))
        part_of: dict[str, list[tuple[Matrix, Matrix]]] = {
            "attention": [
                (getattr(form.layers[i], name), getattr(plain.layers[i], name)) for i in layers for name in "qkvo"
            ],
            "ffn": [
                (getattr(form.layers[i].ffn, n), getattr(plain.layers[i].ffn, n))
                for i in layers
                for n in ("gate", "up")
            ]
            + [(form.layers[i].ffn.downs[-1], plain.layers[i].ffn.downs[-1]) for i in layers],
            "head": [(form.head, plain.head)],
        }
        shares = {
            part: sum(a.nbytes for a, _ in pairs) / sum(b.nbytes for _, b in pairs) for part, pairs in part_of.items()
        }
        if self.spec.draft != "self":  # whose bytes are those of its own form already
            shares["draft"] = shares["ffn"]
        shares["scores"] = self.runtime.cache_dtype.itemsize / itemsize
        names: dict[str, Any] = {
            part: round(getattr(cost.bytes, part) * shares.get(part, 1.0)) for part in Parts.__dataclass_fields__
        }
        return replace(cost, bytes=Parts(**names))
