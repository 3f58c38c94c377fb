"""KV Prediction's configuration and touchpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from rheostat import families
from rheostat.cost import Cost, dense_cost, prediction_cost
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.base import Method, Progress, no_progress
from rheostat.methods.kv_prediction import auxiliary, fitting, predictor, prefix, reading, training
from rheostat.runtime.weights import ReadAhead

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_handles: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
"""Attached model -> the handles of our hooks on it."""


@dataclass(frozen=True, kw_only=True)
class KVPrediction(Method):
    """An auxiliary reads the prompt and predicts the cache (arXiv 2410.08391; what differs is marked in the docs).

    The native setting is how many layers are predicted: 0 is the dense model; between two depths the shallower counts.
    """

    name: ClassVar[str] = "kv_prediction"
    stages: ClassVar[frozenset[str]] = frozenset({"prefill"})
    reads_prompts: ClassVar[bool] = True
    before: ClassVar[Mapping[str, Any]] = {"previous": ()}

    auxiliary: str = auxiliary.PREFIX
    """What reads the prompt: prefix (the model's own first layers), pruned (a copy with layers left out), or the name
    or folder of a smaller model with the same tokenizer."""
    kept: tuple[float, ...] = (0.5,)
    """For a pruned auxiliary: the share of the layers that it keeps, or a list of them."""
    layer_map: tuple[int, ...] = ()
    """For a pruned or a smaller auxiliary: for each layer of the model, the auxiliary's layer that predicts it; empty
    for the rule."""
    keep_auxiliary: bool = True
    """For a pruned or a smaller auxiliary: hold its weights in memory between prompts; false keeps them in a temporary
    file, from which each prompt reads them."""
    depths: tuple[float, ...] = (0.4, 0.5, 2 / 3, 5 / 6)
    """Depths of the auxiliary that the dial chooses from: shares of the model's layers, or whole numbers of them."""
    exact_tokens: int = 1
    """How many of a prompt's last tokens the model itself reads, on the predicted cache; at least the last one."""
    inputs: tuple[float, ...] = (0.0, 1 / 3, 2 / 3)
    """Layers whose input the maps read beside that of the depth itself, as shares of the depth."""
    previous: tuple[float, ...] = (0.0, 1.0)
    """Layers whose input of the token before the maps read too, as shares of the depth: later layers ask what follows
    a word, and find out by keys that know the word before."""
    rank: float = 1.0
    """Rank of all of a depth's maps together, relative to the model's width; 0 leaves them free."""
    ridge: float = 1e-3
    """Ridge of the closed-form fit, relative to the mean of the Gram matrix's diagonal."""
    base_weight: float = 1.0
    """Weight of the model's language-model loss on predicted keys and values, in training."""
    auxiliary_weight: float = 1.0
    """Weight of the auxiliary's own language-model loss, in training; the model's own first layers have none."""
    consistency_weight: float = 1.0
    """Weight of the L1 distance of predicted keys and values from the model's own, a mean over layers (the paper's
    text; its published configurations take the sum over layers, which is this weight times their number)."""
    z_weight: float = 1e-4
    """Weight of the mean square of log-sum-exp of the logits."""
    distill_weight: float = 0.0
    """Share of the language-model loss taken from the dense model's own distribution (not in the paper)."""
    answer_share: float = 0.0
    """Mean share of a training window, its end, that is read as answers are in use: on its own keys and values and the
    predicted ones before it. 0 as published: predicted ones only (more than 0 is not in the paper)."""

    def __post_init__(self) -> None:
        if not self.depths or not all(_is_number(d, 0) and d > 0 and (d < 1 or d == int(d)) for d in self.depths):
            raise bad_setting("kv_prediction.depths", self.depths, "shares between 0 and 1, or whole numbers of layers")
        if not _is_number(self.exact_tokens, 1) or not isinstance(self.exact_tokens, int):
            raise bad_setting("kv_prediction.exact_tokens", self.exact_tokens, "an integer of at least 1")
        if not isinstance(self.keep_auxiliary, bool):
            raise bad_setting("kv_prediction.keep_auxiliary", self.keep_auxiliary, "true or false")
        if not self.keep_auxiliary and not self.has_own_auxiliary:
            logger.warning("kv_prediction.keep_auxiliary=False has no effect: the auxiliary is the model's own layers")
        if not isinstance(self.inputs, tuple) or not all(_is_number(one, 0) and one < 1 for one in self.inputs):
            raise bad_setting("kv_prediction.inputs", self.inputs, "shares of the depth, from 0 to below 1")
        if not isinstance(self.previous, tuple) or not all(_is_number(one, 0) and one <= 1 for one in self.previous):
            raise bad_setting("kv_prediction.previous", self.previous, "shares of the depth, from 0 to 1")
        for field in (
            "rank",
            "ridge",
            "base_weight",
            "auxiliary_weight",
            "consistency_weight",
            "z_weight",
            "distill_weight",
        ):
            if not _is_number(getattr(self, field), 0):
                raise bad_setting(f"kv_prediction.{field}", getattr(self, field), "a finite number of at least 0")
        if self.distill_weight > 1:
            raise bad_setting("kv_prediction.distill_weight", self.distill_weight, "from 0 to 1")
        if not _is_number(self.answer_share, 0) or self.answer_share > 0.5:
            raise bad_setting("kv_prediction.answer_share", self.answer_share, "from 0 to 0.5")

    @property
    def has_own_auxiliary(self) -> bool:
        """Whether the auxiliary is a model of its own, beside the model."""
        return self.auxiliary != auxiliary.PREFIX

    def layer_counts(self, num_layers: int) -> list[int]:
        """The depths on a model of `num_layers` layers, deepest first.

        Raises:
            SettingError: a number of layers that leaves none to predict.
        """
        if self.has_own_auxiliary:
            return [0]
        counts = set()
        for depth in self.depths:
            if depth >= num_layers:
                raise bad_setting("kv_prediction.depths", depth, f"below the model's {num_layers} layers")
            counts.add(int(depth) if depth >= 1 else min(num_layers - 1, max(1, round(depth * num_layers))))
        return sorted(counts, reverse=True)

    def read_layers(self, depth: int) -> list[int]:
        """The layers whose input the maps of a depth read, the depth itself last."""
        return sorted({int(share * depth) for share in self.inputs} | {depth})

    def previous_layers(self, depth: int) -> list[int]:
        """The layers of which the maps of a depth read the token before, too."""
        return sorted({int(share * depth) for share in self.previous})

    def _rank(self, width: int) -> int:
        return round(self.rank * width)

    # -- attach and detach

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model of an unknown family, with too few layers, or with maps on it already."""
        families.family_of(model)
        if model in _handles:
            raise SettingError("model: has KV Prediction attached already; detach it first")
        num_layers = len(families.layers(model))
        if num_layers < 2:
            raise bad_setting("model", f"{num_layers} layer", "of at least 2 layers, so that there are some to predict")
        self.layer_counts(num_layers)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """A smaller model must read the same tokens."""
        auxiliary.check_tokenizer(self.auxiliary, tokenizer)

    def attach(self, model: PreTrainedModel) -> None:
        """Put the maps on the decoder, and hooks on the layers that the auxiliary may stop at."""
        self.check(model)
        depths = self.layer_counts(len(families.layers(model)))
        if self.has_own_auxiliary:
            maps = auxiliary.build(model, self.auxiliary, self.kept, self.layer_map)
            if not self.keep_auxiliary:
                maps.park()
            predictor.attach(model, [maps])
            _handles[model] = []
            return
        inputs = {depth: (self.read_layers(depth), self.previous_layers(depth)) for depth in depths}
        predictor.attach(model, predictor.prefix_maps(model, inputs, self._rank(model.config.hidden_size)))
        _handles[model] = prefix.set_hooks(
            model, depths, {layer for both in inputs.values() for read in both for layer in read}
        )

    def detach(self, model: PreTrainedModel) -> None:
        """Take both off; the model's own weights were never touched."""
        for handle in _handles.pop(model):
            handle.remove()
        predictor.detach(model)

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
        """All depths' maps from one pass over the windows."""
        return fitting.fit(model, windows, ridge=self.ridge, progress=progress)

    def loss(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        teacher_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Language-model loss on predicted keys and values at one depth, drawn at random, and their L1 distance from
        the model's own."""
        return training.loss(self, model, batch)

    def trainable(self, model: PreTrainedModel) -> list[str]:
        """The maps; the model is frozen."""
        return [name for name, _ in model.named_parameters() if f".{predictor.PLACE}." in name]

    # -- the dial

    def setting_range(self) -> tuple[float, float]:
        """Any number of layers; `steps` has those there are."""
        return (0.0, float("inf"))

    def steps(self, geometry: Geometry) -> tuple[float, ...]:
        """How many layers each depth leaves to predict."""
        return tuple(float(geometry.num_layers - depth) for depth in self.layer_counts(geometry.num_layers))

    def _share(self, geometry: Geometry, depth: int) -> float:
        """FLOPs of one prompt token at a depth, as a fraction of the dense model's without the head."""
        layer = geometry.attention_weights + geometry.ffn_weights
        own = depth * layer
        if self.has_own_auxiliary:
            small = self._small(geometry)
            own = small.num_layers * (small.attention_weights + small.ffn_weights)
        return (own + self._map_weights(geometry, depth)) / (geometry.num_layers * layer)

    def _small(self, geometry: Geometry) -> Geometry:
        """The sizes of an auxiliary of its own."""
        if self.auxiliary != auxiliary.PRUNED:
            return Geometry.from_config(auxiliary.load_auxiliary(self.auxiliary)[0].config)
        layers = auxiliary.kept_layers(self.kept, geometry.num_layers)
        windows = tuple(geometry.windows[layer] for layer in layers) if geometry.windows else ()
        return replace(geometry, num_layers=len(layers), windows=windows)

    def _map_weights(self, geometry: Geometry, depth: int) -> int:
        if self.has_own_auxiliary:
            return geometry.num_layers * geometry.kv_values * self._small(geometry).kv_values // 2
        num_features = (len(self.read_layers(depth)) + len(self.previous_layers(depth))) * geometry.hidden_size
        outputs = (geometry.num_layers - depth) * geometry.kv_values
        rank = self._rank(geometry.hidden_size)
        return rank * (num_features + outputs) if 0 < rank < num_features else num_features * outputs

    def floor(self, geometry: Geometry) -> float:
        """A long prompt at the least depth."""
        return min(1.0, self._share(geometry, self.layer_counts(geometry.num_layers)[-1]))

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
        """A prompt read at the deepest auxiliary that costs at most `compute`; a single token is dense."""
        self.check_compute(geometry, compute)
        early = num_tokens - self.exact_tokens
        depths = [d for d in self.layer_counts(geometry.num_layers) if self._share(geometry, d) <= compute]
        if compute == 1.0 or early <= 0 or not depths or (self.has_own_auxiliary and past):
            return dense_cost(geometry, num_tokens=num_tokens, past=past, num_logits=num_logits, itemsize=itemsize)
        first = self._small(geometry) if self.has_own_auxiliary else geometry.first_layers(depths[0])
        weights = self._map_weights(geometry, depths[0])
        ahead = dense_cost(first, num_tokens=early, past=past, num_logits=0, itemsize=itemsize).charged_to("auxiliary")
        ahead += prediction_cost(geometry, geometry.num_layers - depths[0], weights, early, itemsize)
        return ahead + dense_cost(
            geometry, num_tokens=self.exact_tokens, past=past + early, num_logits=num_logits, itemsize=itemsize
        )

    # -- running

    def prefill(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """The prompt through the auxiliary at the depth the dial asks for, its last tokens through the model."""
        return reading.prefill(model, input_ids, attention_mask, cache, key=self.name, num_exact=self.exact_tokens)

    def runtime_prefill(self, model: PreTrainedModel) -> ReadAhead | None:
        """The model's own first layers and the maps; an auxiliary of its own reads on `transformers`."""
        if self.has_own_auxiliary:
            return None
        held = predictor.predictors(model).values()
        return ReadAhead(
            key=self.name,
            num_exact=self.exact_tokens,
            layers={one.depth: one.runtime_maps() for one in held if isinstance(one, predictor.Predictor)},
            depth_at=partial(reading.depth_for, model),
            hook_ids=frozenset(handle.id for handle in _handles[model]),
        )

    # -- saving

    def state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The maps, by depth and layer."""
        return {
            f"{depth}.{name}": tensor.detach()
            for depth, held in predictor.predictors(model).items()
            for name, tensor in held.named_parameters()
        }

    def load_state(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put learned maps back.

        Raises:
            SettingError: they belong to a model of another geometry, or to other depths.
        """
        places = self.state(model)
        if wrong := sorted(set(tensors) ^ set(places)):
            found = "missing" if wrong[0] in places else "of no depth of this method"
            raise SettingError(f"artifact: tensor {wrong[0]} is {found}")
        for name, place in places.items():
            if tensors[name].shape != place.shape:
                raise SettingError(
                    f"artifact: tensor {name} is of shape {tuple(tensors[name].shape)}, must be {tuple(place.shape)}: "
                    "the maps were learned for a model of another geometry"
                )
            with torch.no_grad():
                place.copy_(tensors[name])


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")
