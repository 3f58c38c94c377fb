"""A Llama on a GPU made of the Triton kernels, for `gpu_table.py`: enough to time a step, not a runtime.

A step is captured in a CUDA graph and replayed. Which expert each layer and row takes is given: the router's two small
products are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from rheostat.kernels.triton import DeviceMatrix, NestedWeights, decode_attention, few_rows, pack
from rheostat.kernels.triton.attention import Splits
from rheostat.kernels.triton.ffn_launch import FFNTiles
from rheostat.kernels.triton.language import jit, next_power, tl
from rheostat.kernels.triton.products import Tiles


@dataclass
class Tuned:
    """How each kernel is cut; None leaves it at its default."""

    products: dict[tuple[int, int, int], Tiles]
    """(outputs, inputs, 1 or 16 rows) -> tiles."""
    fused: FFNTiles | None = None
    fused_one: FFNTiles | None = None
    """For one row."""
    grouped: FFNTiles | None = None
    splits: Splits | None = None


@jit
def _rotate(
    qkv, cos, sin, positions, q, keys, values, heads, kv_heads, head_dim,
    qkv_row, key_row, key_head, value_row, value_head, BH: tl.constexpr,
):  # fmt: skip
    """Rotate one head of one row; queries go to `q`, keys and values to slot positions[row] of the cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    half = head_dim // 2
    i = tl.arange(0, BH)
    position = tl.load(positions + row)
    place = qkv + row * qkv_row + head * head_dim + i
    a = tl.load(place, mask=i < half, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask=i < half, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        c = tl.load(cos + position * half + i, mask=i < half, other=0.0)
        s = tl.load(sin + position * half + i, mask=i < half, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    if head < heads:
        to = q + (row * heads + head) * head_dim + i
        tl.store(to, a.to(q.dtype.element_ty), mask=i < half)
        tl.store(to + half, b.to(q.dtype.element_ty), mask=i < half)
    elif head < heads + kv_heads:
        to = keys + row * key_row + (head - heads) * key_head + position * head_dim + i
        tl.store(to, a.to(keys.dtype.element_ty), mask=i < half)
        tl.store(to + half, b.to(keys.dtype.element_ty), mask=i < half)
    else:
        to = values + row * value_row + (head - heads - kv_heads) * value_head + position * head_dim + i
        tl.store(to, a.to(values.dtype.element_ty), mask=i < half)
        tl.store(to + half, b.to(values.dtype.element_ty), mask=i < half)


class Weights:
    """Matrices of a `LlamaForCausalLM`: its own in 16 bits, or packed ones.

    Packed ones serve to be timed, not to be asked: layers are copies of the first, and the head repeats its first rows.
    """

    def __init__(self, model: Any, sizes: tuple[int, ...], format: str) -> None:
        self.config, self.embedding = model.config, model.model.embed_tokens.weight.detach()
        self.inv_freq, self.norm = model.model.rotary_emb.inv_freq.float(), model.model.norm.weight.detach()
        self.layers: list[tuple[DeviceMatrix, DeviceMatrix, NestedWeights, tuple[torch.Tensor, torch.Tensor]]] = []
        first: list[DeviceMatrix] = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
            weights = (qkv, attention.o_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            if format == "bf16":
                matrices = [DeviceMatrix.view(w) for w in weights]
            else:
                first = first or [pack(w.float().cpu(), format, device=w.device) for w in weights]
                matrices = [w.clone() for w in first]
            ffn = NestedWeights.of(*matrices[2:4], matrices[4:], [None], sizes)
            norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
            self.layers.append((matrices[0], matrices[1], ffn, norms))
        head = model.lm_head.weight.detach()
        self.head = DeviceMatrix.view(head) if format == "bf16" else repeated(head, format)


def repeated(weight: torch.Tensor, format: str, rows: int = 4096) -> DeviceMatrix:
    """A packed matrix of the weight's shape, whose rows are its first ones again and again."""
    part = pack(weight[:rows].float().cpu(), format, device=weight.device)
    num = len(weight)

    def fill(one: torch.Tensor | None, total: int) -> torch.Tensor | None:
        return None if one is None else torch.cat([one] * -(-total // len(one)))[:total].contiguous()

    values = fill(part.values, -(-num // 2) if format == "int4" else num)
    assert values is not None
    shape = (num, weight.shape[1])
    return replace(part, shape=shape, values=values, scales=fill(part.scales, num), least=fill(part.least, num))


class Decoder:
    """Weights, a cache, and a step."""

    def __init__(self, weights: Weights, batch: int, slots: int, tuned: Tuned) -> None:
        config, self.tuned = weights.config, tuned
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps, self.embedding = config.head_dim, config.rms_norm_eps, weights.embedding
        self.layers, self.head, self.norm = weights.layers, weights.head, weights.norm
        device, dtype = self.embedding.device, self.embedding.dtype
        shape = (len(self.layers), batch, self.kv_heads, slots, self.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        angles = torch.arange(slots, device=device)[:, None] * weights.inv_freq
        self.cos, self.sin = angles.cos(), angles.sin()
        self.token_ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions, self.starts = torch.zeros_like(self.token_ids), torch.zeros_like(self.token_ids)
        widest = len(self.layers[0][2].widths) - 1
        self.experts = torch.full((len(self.layers), batch), widest, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)

    def product(self, x: torch.Tensor, w: DeviceMatrix) -> torch.Tensor:
        """x times w, cut as tuned."""
        return few_rows(x, w, tiles=self.tuned.products.get((*w.shape, 1 if len(x) == 1 else 16)))

    def step(self) -> None:
        """Take `token_ids` at `positions`, with `experts`; leaves `logits` [B, V]."""
        h = self.embedding[self.token_ids]
        lengths, batch = self.positions + 1, len(self.token_ids)
        fused = self.tuned.fused_one if batch == 1 else self.tuned.fused
        for i, (qkv, o, ffn, norms) in enumerate(self.layers):
            mixed = self.product(functional.rms_norm(h, norms[0].shape, norms[0], self.eps), qkv)
            q = torch.empty(batch, self.heads, self.head_dim, dtype=h.dtype, device=h.device)
            keys, values = self.keys[i], self.values[i]
            _rotate[(batch, self.heads + 2 * self.kv_heads)](
                mixed, self.cos, self.sin, self.positions, q, keys, values, self.heads, self.kv_heads, self.head_dim,
                mixed.stride(0), *keys.stride()[:2], *values.stride()[:2],
                BH=next_power(self.head_dim // 2), num_warps=1,
            )  # fmt: skip
            scale = self.head_dim**-0.5
            seen = decode_attention(q, keys, values, lengths, self.starts, scale=scale, splits=self.tuned.splits)
            h = h + self.product(seen.view(batch, -1), o)
            h = h + ffn.run(functional.rms_norm(h, norms[1].shape, norms[1], self.eps), self.experts[i], tiles=fused)
        self.logits = self.product(functional.rms_norm(h, self.norm.shape, self.norm, self.eps), self.head)

    def captured(self) -> Any:
        """The step as something to call: a CUDA graph's replay, or the step itself on a CPU."""
        if self.embedding.device.type != "cuda":
            return self.step
        return capture(self.step)

    def bytes_of_step(self, length: int) -> int:
        """Bytes that a step must read at `length` cached tokens: weights once, and the rows' keys and values."""
        batch = len(self.token_ids)
        total = self.head.bytes_of()
        for i, (qkv, o, ffn, _) in enumerate(self.layers):
            total += qkv.bytes_of() + o.bytes_of() + ffn.bytes_of(self.experts[i].tolist())
        return total + 2 * len(self.layers) * batch * self.kv_heads * length * self.head_dim * self.keys.element_size()

    def read(self, token_ids: torch.Tensor, experts: torch.Tensor | None) -> torch.Tensor:
        """A prompt [T] through torch's products and attention and the grouped FFN; experts [L, T], None for the full
        FFN by torch. Returns the last token's logits [V]. Nothing is kept in the cache."""
        h = self.embedding[token_ids]
        length = len(token_ids)
        cos, sin = self.cos[:length, None].to(h.dtype), self.sin[:length, None].to(h.dtype)
        for i, (qkv, o, ffn, norms) in enumerate(self.layers):
            mixed = functional.linear(functional.rms_norm(h, norms[0].shape, norms[0], self.eps), qkv.values)
            q, k, v = mixed.view(length, -1, self.head_dim).split([self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = (_turn(one, cos, sin) for one in (q, k))
            rows = [one.transpose(0, 1)[None] for one in (q, k, v)]  # [1, heads, T, d]
            seen = functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
            h = h + functional.linear(seen[0].transpose(0, 1).reshape(length, -1), o.values)
            x = functional.rms_norm(h, norms[1].shape, norms[1], self.eps)
            if experts is None:
                gate, up, down = ffn.gate.values, ffn.up.values, ffn.downs[0].values
                h = h + functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
            else:
                h = h + ffn.run(x, experts[i], tiles=self.tuned.grouped)
        return functional.linear(functional.rms_norm(h[-1], self.norm.shape, self.norm, self.eps), self.head.values)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def capture(action: Any) -> Any:
    """The replay of `action`, captured in a CUDA graph after two runs that compile what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay
