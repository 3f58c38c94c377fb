"""What is timed: stock `transformers`, a dial's setting there, our own runtime, llama.cpp; one interface for all.

Stock and dial run through the same code, `Method`'s prefill and decode with greedy choice, so that what differs
between them is the method. A stock side is the plain host model with no hooks of ours on it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from rheostat import models
from rheostat.adapted import Adapted
from rheostat.bench.timing import Clock, waiter
from rheostat.checkpoints import BUNDLED
from rheostat.cost import Cost, decode_cost, dense_cost
from rheostat.errors import bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.base import Method
from rheostat.spending import spend

if TYPE_CHECKING:
    from transformers import Cache

KINDS = ("stock", "dial", "native", "llama.cpp")


@dataclass(frozen=True, kw_only=True)
class SideSpec:
    """All that is needed to make a side, here or in a process of its own."""

    kind: str
    """One of `KINDS`."""
    model: str
    """As for `rheostat.load`; for llama.cpp the GGUF file."""
    dtype: str = ""
    device: str = "cpu"
    compute: float = 1.0
    threads: int = 0
    context: int = 0
    """Tokens that the cache must hold (llama.cpp asks in advance)."""
    weights: str = "auto"
    """Format of our own runtime's weights."""
    draft: str = ""
    """Who drafts on our own runtime; empty for nobody."""
    draft_length: int | str = 4
    """Tokens drafted a round, or `auto`."""

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.kind == "dial":
            return f"dial {self.compute:g}"
        if self.kind == "native":
            return " ".join(filter(None, ("native", self.weights, self.draft, f"{self.compute:g}")))
        return f"{self.kind} {self.dtype}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self) | {"label": self.label}


@dataclass(frozen=True)
class Spent:
    """What one run costs: the prompt's pass, and the mean of the steps after it."""

    prefill: Cost
    decode: Cost
    """Of all steps together."""
    num_steps: int
    compute: float = 1.0
    """Fraction of the dense model's FLOPs spent, prompt and answer together, attention over the context left out."""
    drafts: dict[str, Any] | None = None
    """What drafting came to (`meter.Speculation.to_dict`), where somebody drafted."""


class Side(ABC):
    """One way to run the model, loaded and ready."""

    spec: SideSpec
    max_rows: int | None = None
    """The largest batch it can take; None for no limit."""

    @abstractmethod
    @contextmanager
    def session(self) -> Iterator[None]:
        """What has to be in force while it runs."""

    @abstractmethod
    def prefill(self, ids: torch.Tensor) -> Any:
        """Read prompts [B, T] and choose a token for each row. Returns what `decode` goes on with."""

    @abstractmethod
    def decode(self, state: Any) -> Any:
        """Read the newest token of each row and choose the next."""

    @abstractmethod
    def wait(self) -> None:
        """Return once everything asked for is done."""

    @abstractmethod
    def spent(self, ids: torch.Tensor, num_steps: int) -> Spent:
        """What a run costs. May run it."""


def once(side: Side, ids: torch.Tensor, new: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Write `new` tokens after the prompts [B, T].

    Returns:
        Seconds to the `first_token` (the prompt's pass), and for each further `token` of a row (mean).
    """
    with side.session():
        side.wait()
        start = clock()
        state = side.prefill(ids)
        side.wait()
        first = clock()
        for _ in range(new - 1):
            state = side.decode(state)
        side.wait()
        end = clock()
    return {"first_token": first - start, "token": (end - first) / (new - 1)}


# -- transformers, with and without a dial


@dataclass
class State:
    """A batch being written."""

    cache: Cache
    mask: torch.Tensor
    """[B, S + 1]."""
    token_ids: torch.Tensor
    """[B, 1], the newest."""


class TorchSide(Side):
    """A model of `transformers` under a method's own prefill and decode."""

    def __init__(self, spec: SideSpec, model: Any, method: Method | None = None) -> None:
        self.spec = spec
        self.model = model
        self.method = method or Method()
        self._wait = waiter(model.device)

    def wait(self) -> None:
        """Return once the device is done."""
        self._wait()

    @contextmanager
    def session(self) -> Iterator[None]:
        """No gradients; for a dial, its setting, with the meter running as it does in use."""
        with torch.inference_mode():
            if self.spec.kind != "dial":
                yield
                return
            with spend(self.spec.compute, keep_passes=False):
                yield

    def prefill(self, ids: torch.Tensor) -> State:
        """One pass over the prompts [B, T]."""
        mask, cache = torch.ones_like(ids), self.method.make_cache(self.model)
        logits = self.method.prefill(self.model, ids, mask, cache)
        return State(cache, torch.nn.functional.pad(mask, (0, 1), value=1), logits.argmax(-1, keepdim=True))

    def decode(self, state: State) -> State:
        """One pass over one token a row."""
        logits = self.method.decode(self.model, state.token_ids, state.mask, state.cache)
        mask = torch.nn.functional.pad(state.mask, (0, 1), value=1)
        return State(state.cache, mask, logits.argmax(-1, keepdim=True))

    def spent(self, ids: torch.Tensor, num_steps: int) -> Spent:
        """By the formula for the stock model; by the meter under a dial, which has to run."""
        itemsize = self.model.dtype.itemsize
        if self.spec.kind != "dial":
            return dense_spent(Geometry.from_config(self.model.config), ids, num_steps, itemsize)
        with torch.inference_mode():
            with spend(self.spec.compute, keep_passes=False) as prefill:
                state = self.prefill(ids)
            with spend(self.spec.compute, keep_passes=False) as decode:
                for _ in range(num_steps):
                    state = self.decode(state)
        used, dense = prefill.cost + decode.cost, prefill.dense + decode.dense
        return Spent(prefill.cost, decode.cost, num_steps, used.flops.flat / dense.flops.flat)


def dense_spent(geometry: Geometry, ids: torch.Tensor, num_steps: int, itemsize: int) -> Spent:
    """What the dense model spends on prompts [B, T] and `num_steps` further tokens a row."""
    num_rows, num_tokens = ids.shape
    prefill = dense_cost(geometry, num_tokens=num_tokens, past=0, num_logits=1, itemsize=itemsize, num_rows=num_rows)
    decode = decode_cost(geometry, num_steps=num_steps, past=num_tokens, itemsize=itemsize, num_rows=num_rows)
    return Spent(prefill, decode, num_steps)


def stock_model(source: str, dtype: str, device: str) -> Any:
    """The plain host model of MODEL. An artifact is also a checkpoint, which plain `transformers` reads."""
    if (Path(source).expanduser() / "rheostat.json").is_file() and source not in BUNDLED:
        model = AutoModelForCausalLM.from_pretrained(Path(source).expanduser(), dtype=models.check_dtype(dtype))
        return model.to(models.check_device(device)).eval()
    return models.load(source, dtype=dtype, device=device)[0]


def make_side(spec: SideSpec, adapted: Adapted | None = None, twin: Side | None = None) -> Side:
    """Load a side.

    Args:
        adapted: of a dial's side or a native one, where it is loaded already.
        twin: a native side of the same model in the same format, whose weights this one may share.

    Raises:
        SettingError: the model cannot be loaded.
    """
    if spec.kind == "stock":
        return TorchSide(spec, stock_model(spec.model, spec.dtype, spec.device))
    if spec.kind in ("dial", "native"):
        if adapted is None:
            found: Any = models.load(spec.model, dtype=spec.dtype, device=spec.device)[0]
            adapted = found if isinstance(found, Adapted) else Adapted(found)
        if spec.kind == "dial":
            return TorchSide(spec, adapted.model, adapted.method)
        from rheostat.bench.drafted import DraftedSide  # here, because they build on this module
        from rheostat.bench.native import NativeSide

        kind = DraftedSide if spec.draft else NativeSide
        return kind(spec, adapted, twin.runtime if isinstance(twin, NativeSide) else None)
    if spec.kind == "llama.cpp":
        from rheostat.bench.llama import LlamaSide

        return LlamaSide(spec)
    raise bad_setting("kind", spec.kind, f"one of {', '.join(KINDS)}")
