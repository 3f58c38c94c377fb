"""DynaMoE's configuration and touchpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from rheostat import families
from rheostat.cost import Cost, Parts, dense_cost, router_cost
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.base import Method, Progress, no_progress
from rheostat.methods.dynamoe import baselines, fitting, freezing, training
from rheostat.methods.dynamoe.difficulty import CRITERIA
from rheostat.methods.dynamoe.experts import expert_sizes
from rheostat.methods.dynamoe.ffn import NestedFFN
from rheostat.methods.dynamoe.routing import Router
from rheostat.methods.dynamoe.solve import RANKINGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = ("damage", "class")
TRAINED = ("routers", "ffn", "all")


@dataclass(frozen=True, kw_only=True)
class DynaMoE(Method):
    """Token difficulty picks a nested slice of each FFN (arXiv 2502.12325; what the paper leaves open is our choice).

    The native setting is the price of compute: nats of damage worth saving one whole FFN (with
    `target="class"`, the slack 1 - theta).
    """

    name: ClassVar[str] = "dynamoe"
    stages: ClassVar[frozenset[str]] = frozenset({"width"})
    holds: ClassVar[bool] = True
    needs_host: ClassVar[bool] = False

    num_experts: int = 4
    """E: slices of (e + 1) / E of the FFN; the last is the whole FFN."""
    tile: int = 64
    """Slice widths are rounded up to a multiple of this many channels."""
    ranking: str = "elimination"
    """Order of the channels: none, activation, activation_weight, elimination."""
    criterion: str = "fisher"
    """What makes a token difficult: cosine, error, fisher, projection, residual."""
    target: str = "damage"
    """What the router predicts: the damage of each slice, or the class of the smallest slice that suffices."""
    tolerance: float = 0.1
    """Damage up to which a slice suffices, for `target="class"` (theta_label = 1 - tolerance)."""
    router_width: int = 32
    """U: hidden width of the router."""
    router_steps: int = 300
    """Optimiser steps of the closed-form stage's router fit, for each layer."""
    refit: bool = True
    """Give each smaller slice its own re-fitted down projection (memory: about (E - 1) / 2 down projections more)."""
    refit_bias: bool = True
    """Let it carry the mean of what was left out (only families with an `mlp_bias` switch can export such a slice)."""
    ridge: float = 0.3
    """Ridge of that fit, around the slice of the model's own down projection, relative to the mean of the Gram
    matrix's diagonal."""
    sequential: bool = True
    """Solve each layer on the stream of the model as adapted so far; otherwise on the dense model's."""
    gradient_share: float = 0.5
    """Share of the calibration windows on which gradients are taken, for `criterion="fisher"`."""
    trained: str = "ffn"
    """What training changes: routers (backbone frozen), ffn (FFN weights and routers), all."""
    router_loss_weight: float = 1.0
    """Weight of the router's loss beside the language-model loss, in training."""
    router_loss_share: float = 0.25
    """Share of the training steps in which the routers learn: labels cost a second pass, and routers need few."""
    distill_weight: float = 0.5
    """Share of the language-model loss taken from the dense teacher's distribution; the rest is from the text."""

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("ranking", self.ranking, RANKINGS),
            ("criterion", self.criterion, tuple(sorted(CRITERIA))),
            ("target", self.target, TARGETS),
            ("trained", self.trained, TRAINED),
        ):
            if value not in allowed:
                raise bad_setting(f"dynamoe.{field}", value, f"one of {', '.join(allowed)}")
        for field, least in (("num_experts", 2), ("tile", 1), ("router_width", 1), ("router_steps", 0)):
            number = getattr(self, field)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise bad_setting(f"dynamoe.{field}", number, f"an integer of at least {least}")
        for field, low, high in (
            ("tolerance", 0.0, float("inf")),
            ("ridge", 0.0, 1.0),
            ("gradient_share", 0.0, 1.0),
            ("router_loss_weight", 0.0, float("inf")),
            ("router_loss_share", 0.0, 1.0),
            ("distill_weight", 0.0, 1.0),
        ):
            number = getattr(self, field)
            if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
                raise bad_setting(f"dynamoe.{field}", number, f"a number from {low:g} to {high:g}")
        if self.criterion == "fisher" and not self.gradient_share:
            raise bad_setting("dynamoe.gradient_share", self.gradient_share, "above 0 for the fisher criterion")

    # -- attach and detach

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model without gated MLPs of one width, or too narrow for the slices."""
        for layer in families.layers(model) if families.family_of(model) else ():
            if isinstance(layer.mlp, NestedFFN):
                raise SettingError("model: has DynaMoE attached already; detach it first")
            mlp = families.gated_mlp(model, layer.mlp)  # type: ignore[arg-type]
            if len(expert_sizes(mlp.ffn_size, self.num_experts, self.tile)) < 2:
                raise bad_setting("dynamoe.tile", self.tile, f"below the FFN's width, {mlp.ffn_size}")

    def attach(self, model: PreTrainedModel) -> None:
        """Put a `NestedFFN` in the place of every MLP; it holds the host's own module and starts as the dense model."""
        self.check(model)
        for i, layer in enumerate(families.layers(model)):
            mlp = families.gated_mlp(model, layer.mlp)  # type: ignore[arg-type]
            sizes = expert_sizes(mlp.ffn_size, self.num_experts, self.tile)
            num_outputs = len(sizes) - (self.target == "damage")
            router = Router(mlp.hidden_size, self.router_width, num_outputs).to(mlp.down.weight)
            layer.mlp = NestedFFN(mlp, i, sizes, router, self.target, self.name).to(mlp.down.weight.device)

    def detach(self, model: PreTrainedModel) -> None:
        """Put the host's MLPs back, channels in their original order."""
        for layer in families.layers(model):
            nested = layer.mlp
            if isinstance(nested, NestedFFN):
                nested.mlp.reorder(nested.order.argsort())
                layer.mlp = nested.host

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
        """Channel order, down projections and routers, from one pass over the windows; the backbone is only
        re-ordered."""
        return fitting.fit(self, model, windows, generator=generator, progress=progress, work_dir=work_dir)

    def loss(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        teacher_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Language-model loss through the routed model plus the routers' loss on the routed stream."""
        return training.loss(self, model, batch, teacher_logits)

    def settle(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """The routers, on what the trained slices cost: training moves the weights faster than the routers learn."""
        if self.trained == "routers":
            return {}
        return fitting.fit(self, model, windows, generator=generator, progress=progress, only_routers=True)

    def trainable(self, model: PreTrainedModel) -> list[str]:
        """Routers always; with `trained="ffn"` all FFN weights; with `all` everything."""
        names = []
        for name, _ in model.named_parameters():
            in_ffn = ".mlp." in name
            if self.trained == "all" or ".mlp.router." in name or (in_ffn and self.trained == "ffn"):
                names.append(name)
        return names

    def wants_teacher(self) -> bool:
        """When distilling, and when there is a loss to distil into (routers alone learn from their labels)."""
        return self.distill_weight > 0 and self.trained != "routers"

    # -- the dial

    def setting_range(self) -> tuple[float, float]:
        """Price from 0 (the dense model) up; slack from 0 to 1."""
        return (0.0, 1.0) if self.target == "class" else (0.0, float("inf"))

    def _router_weights(self, geometry: Geometry) -> int:
        num_outputs = len(expert_sizes(geometry.ffn_size, self.num_experts, self.tile)) - (self.target == "damage")
        return self.router_width * (geometry.hidden_size + num_outputs)

    def floor(self, geometry: Geometry) -> float:
        """Every token of every layer on the smallest slice."""
        smallest = expert_sizes(geometry.ffn_size, self.num_experts, self.tile)[0]
        saved = geometry.channel_weights * (geometry.ffn_size - smallest) - self._router_weights(geometry)
        return 1 - 2 * geometry.num_layers * saved / geometry.token_flops

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
        """The dense cost with the FFN share that `compute` leaves; bytes for one token a pass, where width is
        what is read."""
        self.check_compute(geometry, compute)
        dense = dense_cost(geometry, num_tokens=num_tokens, past=past, num_logits=num_logits, itemsize=itemsize)
        if compute == 1.0:
            return dense
        router = geometry.num_layers * self._router_weights(geometry)
        smallest = expert_sizes(geometry.ffn_size, self.num_experts, self.tile)[0]
        all_channels = geometry.num_layers * geometry.ffn_size
        saved_weights = round((1 - compute) * geometry.token_flops / 2) + router
        channels = max(geometry.num_layers * smallest, all_channels - saved_weights // geometry.channel_weights)
        ffn = geometry.channel_weights * (channels - all_channels)
        less = Cost(flops=Parts(ffn=2 * ffn * num_tokens), bytes=Parts(ffn=ffn * itemsize if num_tokens == 1 else 0))
        return dense + less + router_cost(router, num_tokens, itemsize)

    def baselines(
        self, model: PreTrainedModel, expert_counts: Mapping[int, torch.Tensor], seed: int
    ) -> dict[str, Callable[[int, torch.Tensor], torch.Tensor]]:
        """The best static width a layer, and a random router with the same use of experts."""
        return baselines.baselines(model, expert_counts, seed)

    # -- saving

    def state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Channel order, router and down projections of every layer."""
        out = {}
        for nested in nested_ffns(model):
            out[f"{nested.layer}.order"] = nested.order
            out[f"{nested.layer}.mean_damage"] = nested.mean_damage
            for part in ("router", "downs"):
                for name, tensor in getattr(nested, part).state_dict().items():
                    out[f"{nested.layer}.{part}.{name}"] = tensor
        return out

    def load_state(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put learned tensors back. The host's channels must already be in the learned order."""
        left = dict(tensors)
        for nested in nested_ffns(model):
            if any(key.startswith(f"{nested.layer}.downs.") for key in left):
                nested.add_downs(has_bias=self.refit_bias)
            wanted = {f"{nested.layer}.order": nested.order, f"{nested.layer}.mean_damage": nested.mean_damage}
            for part in ("router", "downs"):
                wanted |= {f"{nested.layer}.{part}.{k}": v for k, v in getattr(nested, part).state_dict().items()}
            for key, place in wanted.items():
                value = left.pop(key, None)
                if value is None or value.shape != place.shape:
                    found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                    raise SettingError(f"artifact: tensor {key} is {found}, must be of shape {tuple(place.shape)}")
                with torch.no_grad():
                    place.copy_(value)
        if left:
            raise SettingError(f"artifact: tensor {sorted(left)[0]} belongs to no layer of this model")

    def freeze(self, model: PreTrainedModel, compute: float) -> tuple[Any, dict[str, torch.Tensor]]:
        """The plain model with every FFN, at every token, cut to the widest slice that costs at most `compute`.

        Routing by token, and the pinned first token, are what a plain checkpoint cannot express.
        """
        return freezing.freeze(model, compute)


def nested_ffns(model: nn.Module) -> list[NestedFFN]:
    """The attached modules, first layer to last."""
    return [layer.mlp for layer in families.layers(model) if isinstance(layer.mlp, NestedFFN)]
