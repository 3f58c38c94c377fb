"""A dense model's parameters under the names that `transformers` gives them, and nothing that computes.

Our own runtime reads a model's tensors and integers and runs none of its code, and importing that code takes longer
than a first token. So where nothing else is wanted, this stands for the model: methods attach to it and load what
they learned, the runtime reads it, and calling it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

BIASES = {
    "llama": lambda config: (config.attention_bias, config.attention_bias),
    "mistral": lambda config: (False, False),
    "qwen2": lambda config: (True, False),
    "qwen3": lambda config: (config.attention_bias, config.attention_bias),
}
"""`config.model_type` of the families known here -> whether query, key and value have biases, and the output."""

NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_parameters"),
)
"""What a configuration has to state. `transformers` fills in what is missing; we do not guess."""


class Unknown(Exception):
    """Not known to be a model that can be read so; the message is the reason. `transformers` can read it."""


class Config(SimpleNamespace):
    """What `config.json` says, as attributes, under the names of `transformers`."""

    model_type: str
    _attn_implementation = "sdpa"

    def get_text_config(self, decoder: bool = True) -> Config:
        """Itself: these models read text alone."""
        return self


class Part(nn.Module):
    """A node of the tree that is no linear layer and no embedding: what it holds, and the numbers it goes by."""


class Skeleton(Part):
    """The whole tree, as far as `families` and the runtime look at it."""

    def __init__(self, config: Config, tensors: Mapping[str, torch.Tensor], generation_config: Any = None) -> None:
        """Hold `tensors` by their names in a checkpoint, not copied.

        Raises:
            Unknown: the configuration or the names are not exactly those of a model that we know.
        """
        super().__init__()
        check(config, tensors)
        self.config, self.generation_config = config, generation_config
        linears = {name: _linear(tensors, name) for name in _linear_names(tensors)}
        self.model = Part()
        rows = _frozen(tensors["model.embed_tokens.weight"])
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=rows)
        self.model.layers = nn.ModuleList(_layer(config, tensors, linears, i) for i in range(config.num_hidden_layers))
        self.model.norm = _norm(config, tensors["model.norm.weight"])
        self.model.rotary_emb = _rotary(config)
        self.lm_head = linears.get("lm_head") or linear_around(rows)
        self.eval()

    @property
    def base_model(self) -> nn.Module:
        """The stack of layers below the head."""
        return self.model

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head


def check(config: Config, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what differs in anything from the plain form of a family.

    Raises:
        Unknown: it does.
    """
    if getattr(config, "model_type", None) not in BIASES:
        raise Unknown(f"the family {getattr(config, 'model_type', None)}")
    if missing := [name for name in NEEDED if getattr(config, name, None) is None]:
        raise Unknown(f"a configuration without {missing[0]}")
    rope = config.rope_parameters
    if set(rope) != {"rope_type", "rope_theta"} or rope["rope_type"] != "default":
        raise Unknown(f"the rotary positions {rope}")
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False) or hasattr(config, "quantization_config"):
        raise Unknown("an FFN with another activation or biases, or quantised weights")
    if (config.model_type == "mistral" and config.sliding_window) or "sliding_attention" in kinds(config):
        raise Unknown("windows of attention")
    wanted = _expected(config)
    if set(wanted) != set(tensors):
        raise Unknown(f"the tensor {sorted(set(wanted) ^ set(tensors))[0]}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise Unknown(f"the shape of {name}, {tuple(tensors[name].shape)}")


def kinds(config: Config) -> tuple[str, ...]:
    """The kind of each layer, where the configuration says."""
    return tuple(getattr(config, "layer_types", None) or ())


def head_dim(config: Config) -> int:
    """d."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _expected(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of such a model."""
    hidden, ffn, width = config.hidden_size, config.intermediate_size, head_dim(config)
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    qkv_bias, o_bias = BIASES[config.model_type](config)
    shapes: dict[str, tuple[int, ...]] = {f"mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
    shapes["mlp.down_proj.weight"] = (hidden, ffn)
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{name}_proj.weight"] = (size, hidden)
        shapes |= {f"self_attn.{name}_proj.bias": (size,)} if qkv_bias else {}
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    shapes |= {"self_attn.o_proj.bias": (hidden,)} if o_bias else {}
    shapes |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if config.model_type == "qwen3":
        shapes |= {f"self_attn.{name}_norm.weight": (width,) for name in ("q", "k")}
    layers = range(config.num_hidden_layers)
    found = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}
    found |= {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    return found | ({} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, hidden)})


def _layer(config: Config, tensors: Mapping[str, torch.Tensor], linears: Mapping[str, nn.Linear], i: int) -> Part:
    layer, attention, mlp, place = Part(), Part(), Part(), f"model.layers.{i}."
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.add_module(name, linears[f"{place}self_attn.{name}"])
    for name in ("q_norm", "k_norm"):
        if (weight := tensors.get(f"{place}self_attn.{name}.weight")) is not None:
            attention.add_module(name, _norm(config, weight))
    numbers: dict[str, Any] = {"head_dim": head_dim(config), "scaling": head_dim(config) ** -0.5}
    vars(attention).update(numbers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        mlp.add_module(name, linears[f"{place}mlp.{name}"])
    mlp.act_fn = nn.SiLU()
    layer.self_attn, layer.mlp = attention, mlp
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer.add_module(name, _norm(config, tensors[f"{place}{name}.weight"]))
    return layer


def _linear_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(("_proj.weight", "lm_head.weight"))]
    return sorted(names)


def _linear(tensors: Mapping[str, torch.Tensor], name: str) -> nn.Linear:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    return linear_around(_frozen(weight), None if bias is None else _frozen(bias))


def linear_around(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer around parameters that are there. It is made small and then filled, because nothing is to be drawn
    at random: not even on the meta device, where drawing imports all of `torch._dynamo`."""
    made = nn.Linear(1, 1, bias=bias is not None)
    made.out_features, made.in_features = weight.shape
    made.weight = weight
    if bias is not None:
        made.bias = bias
    return made


def _norm(config: Config, weight: torch.Tensor) -> Part:
    part = Part()
    part.weight, part.variance_epsilon = _frozen(weight), config.rms_norm_eps
    return part


def _rotary(config: Config) -> Part:
    """Frequencies as `transformers` computes those of the default kind, to the bit."""
    part, width = Part(), head_dim(config)
    places = torch.arange(0, width, 2, dtype=torch.int64).float()
    part.register_buffer("inv_freq", 1.0 / (config.rope_parameters["rope_theta"] ** (places / width)), persistent=False)
    vars(part).update(rope_type="default", attention_scaling=1.0)
    return part


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
