"""What only one model family needs: names of norms, fused projections, activation attributes.

Every other file reaches a model through the functions here, so supporting a new family is a row in `FAMILIES`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rheostat.errors import SettingError, bad_setting


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a decoder layer keeps the parts that methods touch."""

    pre_norm: str = "post_attention_layernorm"
    """The norm whose output the MLP reads; its input is the residual stream."""
    post_norm: str | None = None
    """The norm between the MLP's output and the residual stream, where there is one."""
    is_fused: bool = False
    """Gate and up are one matrix [2F, D], gate first; query, key and value are one matrix too, in this order."""
    has_key_norm: bool = False
    """Keys pass a norm over each head before they are rotated."""
    has_bare_layers: bool = False
    """Some layers do not rotate their keys; the attention's `use_rope` says which do."""
    has_rotary_kinds: bool = False
    """Kinds of layers rotate differently; the attention's `layer_type` is the kind."""


FFN_PROJECTIONS = tuple(
    f"{place}.{name}" for place in ("mlp", "mlp.host") for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
)
"""How the names of the host's projections end, on their own and while a method's FFN holds them."""

_LLAMA_LIKE = Family()
_GEMMA_LIKE = Family(pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    "gemma": _LLAMA_LIKE,
    "gemma2": _GEMMA_LIKE,
    "gemma3_text": replace(_GEMMA_LIKE, has_key_norm=True, has_rotary_kinds=True),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "phi3": Family(is_fused=True),
    "qwen2": _LLAMA_LIKE,
    "qwen3": Family(has_key_norm=True),
    "smollm3": Family(has_bare_layers=True),
}
"""`config.model_type` -> family, keyed as `transformers` names it."""


def family_of(model: nn.Module) -> Family:
    """The family of a causal LM.

    Raises:
        SettingError: the model is of no family with a gated MLP that we know.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise bad_setting("model", kind, f"of a family with a gated MLP: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def decoder(model: Any) -> nn.Module:
    """The stack of layers below the output head."""
    return model.base_model


def layers(model: Any) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return list(decoder(model).layers)  # type: ignore[arg-type]


def head(model: Any) -> nn.Module:
    """The output head."""
    return model.get_output_embeddings()


def logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] of the last hidden states [..., D], as the model's own `forward` makes them; no hook runs."""
    scores = nn.functional.linear(hidden, head(model).weight)  # type: ignore[arg-type]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def pre_norm(model: Any, layer: nn.Module) -> nn.Module:
    """The norm before the MLP; its input is the residual stream that the MLP's output joins."""
    return getattr(layer, family_of(model).pre_norm)


def contribution(model: Any, layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from the MLP's output to what is added to the residual stream (the identity, or a norm)."""
    name = family_of(model).post_norm
    return getattr(layer, name) if name else _identity


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class GatedMLP:
    """One way to see every family's MLP: y = down(act(gate(x)) * up(x)), by channel.

    Weights are returned as views, so slicing copies nothing and training reaches the host's parameters.
    """

    host: nn.Module
    is_fused: bool

    @property
    def ffn_size(self) -> int:
        """F."""
        return self.host.down_proj.in_features  # type: ignore[union-attr,return-value]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.host.down_proj.out_features  # type: ignore[union-attr,return-value]

    @property
    def down(self) -> nn.Linear:
        """[D, F]."""
        return self.host.down_proj  # type: ignore[return-value]

    @property
    def act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The activation between gate and up."""
        return self.host.activation_fn if self.is_fused else self.host.act_fn  # type: ignore[return-value]

    def gate_up(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of gate and up for channels start..stop, each [stop - start, D]."""
        if self.is_fused:
            both = self.host.gate_up_proj.weight  # type: ignore[union-attr]
            half = self.ffn_size
            return both[start:stop], both[half + start : half + stop]  # type: ignore[index]
        return self.host.gate_proj.weight[start:stop], self.host.up_proj.weight[start:stop]  # type: ignore[union-attr,index]

    def gate_up_blocks(self, stops: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weights of gate and up for the channels up to each of `stops` from the one before, the last of them F."""
        widths = [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
        if self.is_fused:
            pieces = self.host.gate_up_proj.weight.split(widths * 2)  # type: ignore[union-attr,operator]
            return list(zip(pieces[: len(widths)], pieces[len(widths) :], strict=True))
        gates, ups = (linear.weight.split(widths) for linear in (self.host.gate_proj, self.host.up_proj))  # type: ignore[union-attr,operator]
        return list(zip(gates, ups, strict=True))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """All hidden activations A = act(gate(x)) * up(x), [..., F], through the host's own modules (adapters
        included)."""
        if self.is_fused:
            gate, up = self.host.gate_up_proj(x).chunk(2, dim=-1)  # type: ignore[operator]
        else:
            gate, up = self.host.gate_proj(x), self.host.up_proj(x)  # type: ignore[operator]
        return self.act(gate) * up

    @torch.no_grad()
    def reorder(self, order: torch.Tensor) -> None:
        """Put the channels into a new order, in place. The function of the MLP stays the same up to rounding."""
        if self.is_fused:
            both = self.host.gate_up_proj.weight  # type: ignore[union-attr]
            both.copy_(both[torch.cat([order, order + self.ffn_size])])  # type: ignore[operator,index]
        else:
            for linear in (self.host.gate_proj, self.host.up_proj):
                linear.weight.copy_(linear.weight[order])  # type: ignore[union-attr,operator,index]
        self.down.weight.copy_(self.down.weight[:, order])


def gated_mlp(model: Any, mlp: nn.Module) -> GatedMLP:
    """See `mlp`, taken from a layer of `model`, as a gated MLP.

    Raises:
        SettingError: the family's MLP is not gated, or has biases (no supported checkpoint has).
    """
    is_fused = family_of(model).is_fused
    names = ("gate_up_proj", "down_proj") if is_fused else ("gate_proj", "up_proj", "down_proj")
    for name in names:
        linear = getattr(mlp, name, None)
        if linear is None:
            raise bad_setting("model", type(mlp).__name__, f"a model whose MLP has {', '.join(names)}")
        if getattr(linear, "bias", None) is not None:
            raise bad_setting("model", f"{type(mlp).__name__} with biases", "a model whose MLP has no biases")
    return GatedMLP(mlp, is_fused)


def plain_mlp(model: Any, layer: Any) -> GatedMLP:
    """The host's own MLP of a layer, whatever a method has put around it."""
    return gated_mlp(model, getattr(layer.mlp, "host", layer.mlp))


class Attachment(nn.Module):
    """Base of every module that a method adds to a host beside its own: no part of the plain model."""


@dataclass(frozen=True)
class KeyValue:
    """One way to see how every family's attention makes the keys and values of a layer.

    "Raw" keys are those that leave the projection: before the norm over each head, where the family has one, and before
    rotation. Raw keys and values are [B, T, K * d], head by head.
    """

    model: Any
    layer: int

    @property
    def attention(self) -> Any:
        """The layer's attention module."""
        return layers(self.model)[self.layer].self_attn

    @property
    def size(self) -> int:
        """K * d: width of the raw keys, and of the values."""
        if family_of(self.model).is_fused:
            return self.model.config.num_key_value_heads * self.attention.head_dim
        return self.attention.k_proj.out_features

    def watch(self, seen: Callable[[str, torch.Tensor], torch.Tensor | None]) -> list[Any]:
        """Show `seen` the raw `keys` and the `values` of every pass; what it returns, if anything, takes their place.

        Returns:
            The handles of the hooks.
        """
        attention, size = self.attention, self.size

        def both(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            query, key, value = output.split([output.shape[-1] - 2 * size, size, size], -1)
            new_key, new_value = seen("keys", key), seen("values", value)
            if new_key is None and new_value is None:
                return None
            return torch.cat(
                [query, key if new_key is None else new_key, value if new_value is None else new_value], -1
            )

        if family_of(self.model).is_fused:
            return [attention.qkv_proj.register_forward_hook(both)]
        return [
            attention.k_proj.register_forward_hook(lambda module, args, output: seen("keys", output)),
            attention.v_proj.register_forward_hook(lambda module, args, output: seen("values", output)),
        ]

    def finish_keys(self, raw: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Raw keys as the cache holds them, normed and rotated: [B, T, K * d] at positions [B, T] -> [B, K, T, d]."""
        attention, family = self.attention, family_of(self.model)
        keys = self.norm_keys(raw).transpose(1, 2)
        if family.has_bare_layers and not attention.use_rope:
            return keys
        kind = [attention.layer_type] if family.has_rotary_kinds else []
        cos, sin = decoder(self.model).rotary_emb(raw, position_ids, *kind)  # type: ignore[operator]
        return sys.modules[type(attention).__module__].apply_rotary_pos_emb(keys, keys, cos, sin)[1]

    def norm_keys(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw keys after the family's norm over each head, still unrotated: [B, T, K * d] -> [B, T, K, d]."""
        keys = self._heads(raw)
        return self.attention.k_norm(keys) if family_of(self.model).has_key_norm else keys

    def finish_values(self, values: torch.Tensor) -> torch.Tensor:
        """Values as the cache holds them: [B, T, K * d] -> [B, K, T, d]."""
        return self._heads(values).transpose(1, 2)

    def _heads(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.unflatten(-1, (-1, self.attention.head_dim))


def key_values(model: Any) -> list[KeyValue]:
    """How each layer makes its keys and values, first layer to last."""
    return [KeyValue(model, layer) for layer in range(len(layers(model)))]


def attention_norm(layer: nn.Module) -> nn.Module:
    """The norm before a layer's attention; its input is the residual stream."""
    return layer.input_layernorm  # type: ignore[return-value]


def plain_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The host's own state dict under its own names, whatever a method has put around its MLPs. Tied tensors
    are kept once."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    added = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Attachment))
    for name, value in model.state_dict().items():
        if name.startswith(added):
            continue
        before, mlp, after = name.partition(".mlp.")
        if mlp and not isinstance(model.get_submodule(f"{before}.mlp"), _host_mlp_type(model)):
            if not after.startswith("host."):
                continue  # a method's own tensor
            name = f"{before}.mlp.{after.removeprefix('host.')}"
        if value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        state[name] = value.detach().cpu().contiguous()
    return state


def _host_mlp_type(model: Any) -> type:
    mlp = layers(model)[0].mlp
    return type(getattr(mlp, "host", mlp))


PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists in a configuration that have an entry for each layer."""


def config_of_layers(config: Any, kept: Sequence[int]) -> Any:
    """A copy of the configuration for a model of these layers alone."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        if values := getattr(config, name, None):
            setattr(config, name, [values[layer] for layer in kept])
    return config


def slice_ffns(
    model: Any, ffn_size: int, downs: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Configuration and state dict of a plain model that keeps only the first `ffn_size` channels of every MLP.

    Args:
        downs: weight [D, ffn_size] and bias [D] or None of each layer's down projection.

    Raises:
        SettingError: there are biases and the family's MLP has no place for them.
    """
    config = copy.deepcopy(model.config)
    config.intermediate_size = ffn_size
    has_bias = any(bias is not None for _, bias in downs)
    if has_bias:
        if "mlp_bias" not in config.to_dict():
            raise SettingError(
                f"export: the re-fitted slices have biases and a plain {config.model_type} MLP has no place for them; "
                "adapt with refit_bias=false to export this family"
            )
        config.mlp_bias = True
    fused = family_of(model).is_fused
    state = {}
    for name, value in plain_state_dict(model).items():
        if name.endswith("mlp.gate_up_proj.weight"):
            gate, up = value.chunk(2)
            value = torch.cat([gate[:ffn_size], up[:ffn_size]])
        elif name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
            value = value[:ffn_size].clone()  # a view would drag the whole matrix along, and is refused on saving
            if has_bias:  # the switch is one for all three projections
                state[name.removesuffix("weight") + "bias"] = torch.zeros(ffn_size, dtype=value.dtype)
        elif name.endswith("mlp.down_proj.weight"):
            layer = int(name.split(".mlp.")[0].rpartition(".")[2])
            weight, bias = downs[layer]
            value = weight.detach().cpu().contiguous()
            if bias is not None:
                state[name.removesuffix("weight") + "bias"] = bias.detach().cpu()
        state[name] = value
    assert not (fused and has_bias)
    return config, state
