"""`Chain`: several methods, in order, as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rheostat.cost import Cost
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.base import Method, Progress, no_progress
from rheostat.runtime.weights import CacheForm, DraftForm, ReadAhead
from rheostat.speculate.drafter import Drafter, Stopping

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, init=False)
class Chain(Method):
    """Methods at different stages, attached in order and detached in reverse; two that claim one stage are refused.

    For a touchpoint that only one method can answer (cache, prefill, decode), the one that claims that stage answers.
    """

    name: ClassVar[str] = "chain"
    methods: tuple[Method, ...] = ()

    def __init__(self, methods: tuple[Method, ...] | list[Method] = ()) -> None:
        claimed: dict[str, str] = {}
        names: set[str] = set()
        for method in methods:
            if not isinstance(method, Method) or isinstance(method, Chain):
                raise bad_setting("chain.methods", method, "a list of methods, none of them a chain")
            for stage in sorted(method.stages):
                if stage in claimed:
                    raise SettingError(
                        f"chain.methods: {claimed[stage]} and {method.name} both act at the stage {stage}; use "
                        f"one of them"
                    )
                claimed[stage] = method.name
            if method.name in names:
                raise bad_setting("chain.methods", method.name, "named once")
            names.add(method.name)
        object.__setattr__(self, "methods", tuple(methods))

    def at(self, stage: str) -> Method:
        """The method that claims `stage`, or the plain model."""
        return next((m for m in self.methods if stage in m.stages), Method())

    def acts_at(self) -> frozenset[str]:
        """The stages of all its methods."""
        return frozenset().union(*(method.acts_at() for method in self.methods))

    def check(self, model: PreTrainedModel) -> None:
        """Every method must accept the model."""
        for method in self.methods:
            method.check(model)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Every method must accept the tokenizer."""
        for method in self.methods:
            method.check_tokenizer(tokenizer)

    def attach(self, model: PreTrainedModel) -> None:
        """In order; a failure takes off again what was attached."""
        done: list[Method] = []
        try:
            for method in self.methods:
                method.attach(model)
                done.append(method)
        except Exception:
            for method in reversed(done):
                method.detach(model)
            raise

    def detach(self, model: PreTrainedModel) -> None:
        """In reverse order."""
        for method in reversed(self.methods):
            method.detach(model)

    def fit(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
        work_dir: Path | None = None,
    ) -> dict[str, Any]:
        """Each method in order, on the model as the ones before it left it."""
        facts = {}
        for m in self.methods:
            folder = None if work_dir is None else work_dir / m.name
            facts[m.name] = m.fit(model, windows, generator=generator, progress=progress, work_dir=folder)
        return facts

    def loss(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        teacher_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The sum of the losses of those that teach."""
        total = torch.zeros((), device=batch["input_ids"].device)
        parts: dict[str, float] = {}
        for method in self._teaching():
            loss, logged = method.loss(model, batch, teacher_logits)
            total = total + loss
            parts |= {f"{method.name}.{key}": value for key, value in logged.items()}
        return total, parts

    def settle(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """Each method in order."""
        facts = {m.name: m.settle(model, windows, generator=generator, progress=progress) for m in self.methods}
        return {name: figures for name, figures in facts.items() if figures}

    def trainable(self, model: PreTrainedModel) -> list[str]:
        """All that any of those that teach trains."""
        wanted = {name for method in self._teaching() for name in method.trainable(model)}
        return [name for name, _ in model.named_parameters() if name in wanted]

    def _teaching(self) -> list[Method]:
        """Those that say what training minimises or changes; the plain model where none does. The others leave it to
        them: the default of one must not train all that another one freezes."""
        plain = (Method.loss, Method.trainable)
        return [m for m in self.methods if (type(m).loss, type(m).trainable) != plain] or [Method()]

    def wants_teacher(self) -> bool:
        """When any of the methods does."""
        return any(method.wants_teacher() for method in self.methods)

    def dialled(self) -> list[Method]:
        """Those of its methods that have a setting to turn."""
        return [one for method in self.methods for one in method.dialled()]

    def floor(self, geometry: Geometry) -> float:
        """What the methods reach together, their savings taken as independent."""
        reached = 1.0
        for method in self.methods:
            reached *= method.floor(geometry)
        return reached

    def cost(
        self,
        geometry: Geometry,
        *,
        compute: float = 1.0,
        num_tokens: int,
        past: int = 0,
        num_logits: int = 1,
        itemsize: int = 2,
    ) -> Cost:
        """The cost under the one method that has a dial, less what the others save on the dense model; several dials
        need a joint calibration and are not predicted."""
        self.check_compute(geometry, compute)
        dialled = self.dialled()
        if len(dialled) > 1 and compute < 1:
            names = ", ".join(m.name for m in dialled)
            raise bad_setting("compute", compute, f"1.0: the cost of {names} together is known by measurement only")
        about = {"num_tokens": num_tokens, "past": past, "num_logits": num_logits, "itemsize": itemsize}
        dense = Method().cost(geometry, **about)
        cost = dialled[0].cost(geometry, compute=compute, **about) if dialled else dense
        for method in self.methods:
            if method not in dialled:
                cost += method.cost(geometry, **about) + dense.times(-1)
        return cost

    def baselines(
        self, model: PreTrainedModel, expert_counts: Mapping[int, torch.Tensor], seed: int
    ) -> dict[str, Callable[[int, torch.Tensor], torch.Tensor]]:
        """Those of its methods, by their names."""
        return {
            name: override for m in self.methods for name, override in m.baselines(model, expert_counts, seed).items()
        }

    def drafter(self, stopping: Stopping | None = None) -> Drafter | None:
        """Of the method at the decode stage."""
        return self.at("decode").drafter(stopping)

    def cache_form(self) -> CacheForm | None:
        """Of the method at the cache stage."""
        return self.at("cache").cache_form()

    def draft_form(self) -> DraftForm | None:
        """Of the method at the decode stage."""
        return self.at("decode").draft_form()

    def make_cache(self, model: PreTrainedModel) -> Cache:
        """From the method at the cache stage."""
        return self.at("cache").make_cache(model)

    def prefill(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """By the method at the prefill stage."""
        return self.at("prefill").prefill(model, input_ids, attention_mask, cache)

    def runtime_prefill(self, model: PreTrainedModel) -> ReadAhead | None:
        """Of the method at the prefill stage."""
        return self.at("prefill").runtime_prefill(model)

    def decode(
        self, model: PreTrainedModel, token_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """By the method at the decode stage."""
        return self.at("decode").decode(model, token_ids, attention_mask, cache)

    def verify(
        self, model: PreTrainedModel, token_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """By the method at the decode stage."""
        return self.at("decode").verify(model, token_ids, attention_mask, cache)

    def state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Each method's tensors under its name."""
        return {f"{m.name}/{key}": value for m in self.methods for key, value in m.state(model).items()}

    def load_state(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hand each method its own tensors."""
        prefixes = tuple(f"{method.name}/" for method in self.methods)
        if unknown := sorted(key for key in tensors if not key.startswith(prefixes)):
            raise SettingError(f"artifact: tensor {unknown[0]} belongs to no method of this chain")
        for method in self.methods:
            prefix = f"{method.name}/"
            method.load_state(model, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def freeze(self, model: PreTrainedModel, compute: float) -> tuple[Any, dict[str, torch.Tensor]]:
        """Only a chain of at most one method can be frozen."""
        if len(self.methods) > 1:
            raise SettingError("export: a chain of several methods has no plain checkpoint; export one of them")
        return (self.methods[0] if self.methods else Method()).freeze(model, compute)

    def to_dict(self) -> dict[str, Any]:
        """The methods' settings, in order."""
        return {"name": self.name, "methods": [m.to_dict() for m in self.methods]}
