"""`Method`: a frozen configuration plus the touchpoints a method may override. The base class is the plain model.

A touchpoint that a method leaves alone does the ordinary thing, so the dense baseline is `Method()` and no caller
ever asks whether there is a method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from rheostat import families
from rheostat.cost import Cost, dense_cost
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.runtime.weights import CacheForm, DraftForm, FFNWeights, ReadAhead
from rheostat.speculate.drafter import Drafter, Stopping

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

STAGES = ("weights", "width", "depth", "prompt", "prefill", "cache", "decode", "training", "analysis")
"""Where a method may act. Methods at different stages compose; two at one stage are refused."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


class MeteredFFN(nn.Module):
    """Base of every FFN that a method puts in a layer's place and that bills its own cost to the meter."""

    is_naive: bool = False
    """Call the host's projections as modules, whole, so that adapters on them take part; slower."""

    def runtime_weights(self) -> FFNWeights | None:
        """This FFN as the runtime computes it, as views of its parameters; None (the default) when the runtime cannot,
        and `transformers` runs the model."""
        return None


class StandIn(nn.Linear):
    """Base of every linear layer that a method puts in another's place, sharing its parameters under the same names.
    Unless the method says otherwise, for a time, it computes what its host does."""

    @property
    def host(self) -> nn.Linear:
        """The layer whose place this is."""
        raise NotImplementedError


M = TypeVar("M", bound="Method")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The plain model: every touchpoint's default.

    A method is a frozen dataclass that subclasses this one and nothing deeper. Its fields are its settings; what it
    learns lives in the modules it attaches, and is read and written by `state` and `load_state`.
    """

    name: ClassVar[str] = "dense"
    stages: ClassVar[frozenset[str]] = frozenset()
    is_permanent: ClassVar[bool] = False
    """The method changes weights for good: detaching cannot bring the original model back."""
    needs_host: ClassVar[bool] = True
    """Attaching, loading and running need the model's own code. Where they touch its parameters alone, a `Skeleton`
    will do for our own runtime."""
    reads_prompts: ClassVar[bool] = False
    """`prefill` does more than run the model on the prompt; the host's `generate` then reads prompts through it."""
    holds: ClassVar[bool] = False
    """The layers ask `Pass.held` for their setting and tell it what each token saved, where there is one."""
    before: ClassVar[Mapping[str, Any]] = {}
    """What settings amounted to before there were any such: artifacts written then do not name them."""

    # -- attach and detach

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that this method cannot change.

        Raises:
            SettingError: with the reason.
        """
        families.family_of(model)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that what this method brings along cannot read. Default: any will do.

        Raises:
            SettingError: with the reason.
        """

    def attach(self, model: PreTrainedModel) -> None:
        """Change the model in place. Before anything is learned, the changed model computes the same function."""

    def detach(self, model: PreTrainedModel) -> None:
        """Undo `attach` and all that a fit changed, to the last bit; weights that training changed stay as trained."""

    # -- learning

    def fit(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
        work_dir: Path | None = None,
    ) -> dict[str, Any]:
        """Solve in closed form whatever can be, on calibration windows [N, T] of token ids.

        Args:
            work_dir: where to keep what is done, and to take it from when called again after an interruption. The
                caller sees to it that the folder is of the same call.

        Returns:
            Figures about the fit, for the report.
        """
        return {}

    def loss(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        teacher_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Training loss of one batch and its parts for the log. Default: next-token cross-entropy.

        Args:
            model: the attached model.
            batch: `input_ids` [B, T], and what else the model takes.
            teacher_logits: [B, T, V] of the dense model, when distilling.
        """
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)  # padding is not to be learned
        out = model(**batch, labels=labels)
        return out.loss, {"lm": float(out.loss.detach())}

    def settle(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """After training, and before the dial is measured: solve anew, on calibration windows [N, T], what the trained
        weights have outrun. Returns figures for the report; default: there is nothing to do."""
        return {}

    def trainable(self, model: PreTrainedModel) -> list[str]:
        """Names of the parameters that training changes. Default: all."""
        return [name for name, _ in model.named_parameters()]

    def wants_teacher(self) -> bool:
        """Whether the loss uses the dense model's logits."""
        return False

    def acts_at(self) -> frozenset[str]:
        """The stages that this method, or any within it, acts at."""
        return self.stages

    # -- the dial

    def neutral(self) -> float:
        """The native setting that means "the dense model"."""
        return 0.0

    def setting_range(self) -> tuple[float, float]:
        """The native setting's range, from the most compute to the least. Default: there is nothing to set."""
        return (0.0, 0.0)

    def steps(self, geometry: Geometry) -> tuple[float, ...] | None:
        """The native settings there are on such a model, from the most compute to the least and without the neutral
        one, where they are few; None where every number in the range is one. What lies between two steps counts as
        the step that costs less."""
        return None

    def at(self, stage: str) -> Method:
        """The method in this one that acts at `stage`; the plain model where none does."""
        return self if stage in self.stages else Method()

    def dialled(self) -> list[Method]:
        """The methods in this one that have a native setting to turn."""
        low, high = self.setting_range()
        return [self] if high > low else []

    def floor(self, geometry: Geometry) -> float:
        """The smallest `compute` this method can reach on a model of this geometry."""
        return 1.0

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
        """What one forward pass over one row is expected to cost at `compute`. Never rises when `compute` falls."""
        self.check_compute(geometry, compute)
        return dense_cost(geometry, num_tokens=num_tokens, past=past, num_logits=num_logits, itemsize=itemsize)

    def check_compute(self, geometry: Geometry, compute: float) -> None:
        """Refuse a `compute` below the floor.

        Raises:
            SettingError: with the reachable range.
        """
        low = self.floor(geometry)
        if not low <= compute <= 1:
            least = math.ceil(low * 1000) / 1000  # rounded up, so that what we offer is allowed
            raise bad_setting("compute", compute, f"between {least:.3f} and 1 for {self.name} on this model")

    def baselines(
        self, model: PreTrainedModel, expert_counts: Mapping[int, torch.Tensor], seed: int
    ) -> dict[str, Callable[[int, torch.Tensor], torch.Tensor]]:
        """What the method has to beat at the same mean compute, as overrides for `rheostat.spend`, by name.

        Args:
            expert_counts: layer -> [E], how many tokens took each expert in the run to be matched.
            seed: for baselines that draw lots.
        """
        return {}

    # -- running

    def drafter(self, stopping: Stopping | None = None) -> Drafter | None:
        """How the method drafts for itself, for `speculate="self"`; None when it has no way of its own."""
        return None

    def cache_form(self) -> CacheForm | None:
        """The cache that our own runtime has to keep for this method; None: an ordinary one."""
        return None

    def draft_form(self) -> DraftForm | None:
        """What our own runtime reads while this method drafts; None: the method has no draft that it knows."""
        return None

    def make_cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache for `model`."""
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        """Read a prompt [B, T] into `cache`. Returns the next token's logits [B, V]."""
        out = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask)[:, -input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def runtime_prefill(self, model: PreTrainedModel) -> ReadAhead | None:
        """How our runtime reads prompts as `prefill` does, as views of the model's parameters; None (the default) when
        it runs the model on them, or where `prefill` does what the runtime cannot."""
        return None

    def decode(
        self,
        model: PreTrainedModel,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        """One step: take the newest tokens [B, 1] and return the next token's logits [B, V]."""
        return Method.prefill(self, model, token_ids, attention_mask, cache)

    def verify(
        self,
        model: PreTrainedModel,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        """Check a draft: take the newest token and the drafted ones [B, T]; the logits after each are [B, T, V]."""
        out = model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask)[:, -token_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits

    # -- saving

    def state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """What this method learned, by name; the host model's own weights are not in it."""
        return {}

    def load_state(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned, on an attached model.

        Raises:
            SettingError: a tensor is missing, unknown or of another shape.
        """
        if tensors:
            raise SettingError(f"artifact: {self.name} has no tensors, the file has {len(tensors)}")

    def freeze(self, model: PreTrainedModel, compute: float) -> tuple[Any, dict[str, torch.Tensor]]:
        """Configuration and state dict of a plain model that does at every token what this one does at `compute`.

        Raises:
            SettingError: a plain checkpoint cannot express it; says why.
        """
        if compute != 1.0:
            raise bad_setting("compute", compute, f"1.0: {self.name} has no cheaper setting")
        return model.config, families.plain_state_dict(model)

    # -- configuration

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types, with the method's name."""
        return {"name": self.name} | {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[M], settings: Mapping[str, Any]) -> M:
        """The method with these settings; unknown keys are errors.

        Raises:
            SettingError: a key or a value is not allowed.
        """
        given = {key: value for key, value in settings.items() if key != "name"}
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise bad_setting(f"{cls.name}.{key}", given[key], f"one of the settings {', '.join(known)}")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, S] that skip left padding, as `generate` counts them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
