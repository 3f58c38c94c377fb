"""Tiny random models of each family, for tests: two layers, seconds on a CPU, nothing downloaded."""

from __future__ import annotations

import copy
import json
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from rheostat.adapted import Adapted
from rheostat.calibration import calibrate
from rheostat.dial import Dial
from rheostat.geometry import Geometry
from rheostat.methods import DynaMoE, Method

SMOLLM2 = Geometry(
    num_layers=30,
    hidden_size=576,
    ffn_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    is_tied=True,
)
"""The bundled model's sizes; no weights are needed to compute its costs."""

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
EXTRA = {
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},  # no sdpa
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen3": {"tie_word_embeddings": False},
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
CONTRACT_FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3")


def tiny_model(family: str = "llama", seed: int = 0, *, layers: int = 2) -> PreTrainedModel:
    """A random causal LM whose predictions are far from uniform, so that differences show."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**SIZES | EXTRA.get(family, {}) | {"num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def tiny_windows(num: int = 12, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids [num, length], special tokens left out."""
    return torch.randint(3, VOCAB, (num, length), generator=torch.Generator().manual_seed(seed))


def tiny_adapted(family: str = "llama", seed: int = 0, **settings: object) -> Adapted:
    """A tiny model with DynaMoE solved in closed form and its dial measured."""
    defaults: dict[str, object] = {"tile": 4, "router_width": 8, "router_steps": 30}
    defaults |= {"router_loss_share": 1.0, "distill_weight": 1.0}  # so that every step of training is alike
    return tiny_fitted(DynaMoE(**(defaults | settings)), family, seed)  # type: ignore[arg-type]


class Solved(NamedTuple):
    """What a fit and the measuring of the dial left."""

    host: dict[str, torch.Tensor]
    learned: dict[str, torch.Tensor]
    dial: Dial


_solved: dict[str, Solved] = {}


def tiny_fitted(method: Method, family: str = "llama", seed: int = 0, *, layers: int = 2) -> Adapted:
    """A tiny model with any method solved in closed form and its dial measured: once in each process, which is most of
    the time that many tests took. Every call gives a model of its own, put together as `load` does it."""
    key = json.dumps([method.to_dict(), family, seed, layers])
    if key not in _solved:
        with torch.inference_mode(False), torch.enable_grad():
            _solved[key] = _kept(tiny_solved(method, family, seed, layers=layers))
    found = _solved[key]
    adapted = Adapted(tiny_model(family, seed, layers=layers), method, copy.deepcopy(found.dial))
    adapted.method.load_state(adapted.model, found.learned)
    adapted.model.load_state_dict(found.host)
    return adapted


def tiny_solved(method: Method, family: str = "llama", seed: int = 0, *, layers: int = 2) -> Adapted:
    """The same, solved now: for tests of what a fit leaves in the model itself."""
    adapted = Adapted(tiny_model(family, seed, layers=layers), method)
    adapted.method.fit(adapted.model, tiny_windows(), generator=torch.Generator().manual_seed(0))
    adapted.dial = calibrate(adapted, tiny_windows(seed=1))
    return adapted


def _kept(adapted: Adapted) -> Solved:
    host, learned = adapted.model.state_dict(), adapted.method.state(adapted.model)
    return Solved(*({name: t.detach().clone() for name, t in one.items()} for one in (host, learned)), adapted.dial)
