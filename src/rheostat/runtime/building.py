"""From a model of `transformers` to `DecoderWeights`, without copying, or the reason why not.

Strict on purpose: what is not known to be computed exactly as we do it (an adapter around a projection, a patched
attention, a hook, a norm of another kind) is refused, and the caller goes to `transformers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rheostat import families
from rheostat.methods.base import MeteredFFN, StandIn
from rheostat.runtime.weights import DecoderWeights, FFNWeights, LayerWeights
from rheostat.skeleton import Part

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
"""`config.model_type` of the families whose layers are as `LayerWeights` says."""

ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies do not depend on the length of the text."""

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""`transformers`' own attention functions, all of one meaning; any other name is somebody's own."""


class Unsupported(Exception):
    """The runtime cannot run this; the message is the reason, for the log."""


def build(model: Any, hooks: frozenset[int] = frozenset()) -> DecoderWeights:
    """The weights of a model, methods attached or not, as views of its own parameters.

    Args:
        hooks: ids of hooks that the caller answers for.

    Raises:
        Unsupported: with the reason.
    """
    config = model.config
    if config.model_type not in SUPPORTED:
        raise Unsupported(f"the family {config.model_type}")
    if (kind := config._attn_implementation) not in ATTENTIONS:
        raise Unsupported(f"the attention {kind}")
    if model.training:
        raise Unsupported("a model in training mode")
    if {p.device.type for p in model.parameters()} != {"cpu"}:
        raise Unsupported(f"the device {model.device}")
    decoder: Any = families.decoder(model)
    head, rotary = families.head(model), decoder.rotary_emb
    if getattr(rotary, "rope_type", None) not in ROPES:
        raise Unsupported(f"rotary positions of the kind {getattr(rotary, 'rope_type', None)}")
    first = families.layers(model)[0]
    attention: Any = first.self_attn
    embedding, out = _embedding(decoder.embed_tokens, hooks), _linear(head, hooks, biases=False)[0]
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(model, layer, hooks) for layer in families.layers(model)),
        final_norm=_norm(decoder.norm, hooks),
        head=embedding if _is_tied(embedding, out) else out,
        inv_freq=rotary.inv_freq,
        rope_scale=float(rotary.attention_scaling),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=attention.head_dim,
        attention_scale=float(attention.scaling),
        eps=_eps(decoder.norm),
        activation=_activation(families.plain_mlp(model, first).act),
        max_positions=config.max_position_embeddings,
    )


def stamp(model: Any, weights: DecoderWeights) -> tuple[Any, ...]:
    """What differs once a model may compute something else: where each of its tensors is, how often it was written,
    and the integers of the layers."""
    tensors = (*model.parameters(), *model.buffers())
    written = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors)
    shape = tuple((one.window, one.ffn.sizes, len(one.ffn.downs)) for one in weights.layers)
    return (written, shape, weights.attention_scale, weights.rope_scale)


def _layer(model: Any, layer: Any, hooks: frozenset[int]) -> LayerWeights:
    attention = layer.self_attn
    for module in (layer, attention):
        _check_own(module, hooks)
    if hasattr(attention, "qkv_proj"):
        q, k, v, biases = _split(attention.qkv_proj, model.config, hooks)
    else:
        found = [_linear(getattr(attention, name), hooks) for name in ("q_proj", "k_proj", "v_proj")]
        (q, k, v), biases = [weight for weight, _ in found], [bias for _, bias in found]
    o, o_bias = _linear(attention.o_proj, hooks)
    return LayerWeights(
        input_norm=_norm(layer.input_layernorm, hooks),
        **{"q": q, "k": k, "v": v, "o": o},
        **dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True)),
        o_bias=o_bias,
        q_norm=_norm(attention.q_norm, hooks) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm, hooks) if hasattr(attention, "k_norm") else None,
        has_rope=bool(getattr(attention, "use_rope", True)),
        window=_window(model.config, attention),
        post_norm=_norm(layer.post_attention_layernorm, hooks),
        ffn=_ffn(model, layer, hooks),
    )


def _ffn(model: Any, layer: Any, hooks: frozenset[int]) -> FFNWeights:
    mlp = layer.mlp
    if isinstance(mlp, MeteredFFN):
        _check_hooks(mlp, hooks)
        found = mlp.runtime_weights()
        if found is None:
            raise Unsupported(f"an FFN of the kind {type(mlp).__name__}")
        host = families.plain_mlp(model, layer).host
    else:
        host = mlp
        plain = families.plain_mlp(model, layer)
        gate, up, down = (one.detach() for one in (*plain.gate_up(0, plain.ffn_size), plain.down.weight))
        found = FFNWeights(gate=gate, up=up, downs=(down,), down_biases=(None,), sizes=(plain.ffn_size,))
    _check_own(host, hooks)
    for linear in host.children():
        if hasattr(linear, "weight"):
            _linear(linear, hooks, biases=False)
    return found


def _split(
    fused: nn.Module, config: Any, hooks: frozenset[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    weight, bias = _linear(fused, hooks)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = [config.num_attention_heads * width] + [config.num_key_value_heads * width] * 2
    q, k, v = weight.split(sizes)
    return q, k, v, [None] * 3 if bias is None else list(bias.split(sizes))


def _linear(
    module: nn.Module, hooks: frozenset[int], *, biases: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    while isinstance(module, StandIn):
        _check_hooks(module, hooks)
        module = module.host
    if type(module) is not nn.Linear:
        raise Unsupported(f"a projection of the kind {type(module).__name__}")
    _check_hooks(module, hooks)
    if module.bias is not None and not biases:
        raise Unsupported("biases in the FFN or the head")
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _embedding(module: nn.Module, hooks: frozenset[int]) -> torch.Tensor:
    if type(module) is not nn.Embedding:
        raise Unsupported(f"an embedding of the kind {type(module).__name__}")
    _check_hooks(module, hooks)
    return module.weight.detach()


def _is_tied(embedding: torch.Tensor, head: torch.Tensor) -> bool:
    return embedding.data_ptr() == head.data_ptr() and embedding.shape == head.shape


def _norm(module: Any, hooks: frozenset[int]) -> torch.Tensor:
    _check_own(module, hooks)
    return module.weight.detach()


def _eps(module: Any) -> float:
    return float(module.variance_epsilon)


def _window(config: Any, attention: Any) -> int:
    window = getattr(attention, "sliding_window", None)
    if window is None and config.model_type in ("mistral", "phi3"):  # those keep it in the configuration alone
        window = config.sliding_window
    return int(window or 0)


def _activation(act: Any) -> str:
    if isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation":
        return "silu"
    names = {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "ReLU": "relu"}
    if type(act).__name__ not in names:
        raise Unsupported(f"the activation {type(act).__name__}")
    return names[type(act).__name__]


def _check_own(module: nn.Module, hooks: frozenset[int]) -> None:
    """Refuse a module that is not of `transformers` (or of a skeleton of it), or that was given another forward."""
    is_known = isinstance(module, Part) or type(module).__module__.startswith("transformers.models.")
    if not is_known or "forward" in vars(module):
        raise Unsupported(f"a module of the kind {type(module).__name__}")
    _check_hooks(module, hooks)


def _check_hooks(module: nn.Module, known: frozenset[int]) -> None:
    if {*module._forward_hooks, *module._forward_pre_hooks} - known:
        raise Unsupported(f"a hook on {type(module).__name__}")
