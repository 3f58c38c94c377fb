"""llama.cpp on a GGUF file, as a side: through its Python binding, which takes one sequence at a time."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig

from rheostat.bench.sides import Side, SideSpec, Spent, dense_spent
from rheostat.checkpoints import BUNDLED
from rheostat.conversion import convert_gguf
from rheostat.cost import Cost, Parts
from rheostat.errors import SettingError
from rheostat.geometry import Geometry
from rheostat.models import gguf_file, load, model_digest

BATCH = 512
"""Prompt tokens that llama.cpp takes in one pass: each pass reads the weights once more."""
CACHE_BYTES = 2
"""Of one number in its cache (float16)."""


def is_installed() -> bool:
    """Whether the binding can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def find_gguf(source: str, base_digest: str | None) -> Path | None:
    """The GGUF file of MODEL: its own, or a bundled model's that an artifact was made from."""
    if (own := gguf_file(source)) is not None:
        return own
    for name in BUNDLED if base_digest else ():
        try:
            if model_digest(load(name)[0]) == base_digest:
                return gguf_file(name)
        except SettingError:  # not installed
            continue
    return None


@dataclass(frozen=True)
class Weights:
    """Bytes of a GGUF file's matrices, by part."""

    attention: int
    ffn: int
    head: int
    row: int
    """One row of the embedding matrix."""
    kind: str
    """The format that most of the bytes have."""

    @classmethod
    def of(cls, path: Path) -> Weights:
        """Read from the file's table of tensors."""
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1}
        sizes = {name: int(tensor.n_bytes) for name, tensor in tensors.items()}
        kinds: Counter[str] = Counter()
        for name, tensor in tensors.items():
            kinds[tensor.tensor_type.name] += sizes[name]
        embeddings = "token_embd.weight"
        return cls(
            attention=sum(size for name, size in sizes.items() if ".attn_" in name),
            ffn=sum(size for name, size in sizes.items() if ".ffn_" in name),
            head=sizes.get("output.weight", sizes[embeddings]),
            row=sizes[embeddings] // int(tensors[embeddings].shape[1]),  # as GGUF has it: [D, V]
            kind=kinds.most_common(1)[0][0],
        )

    def bill(self, cost: Cost, num_passes: int, num_tokens: int) -> Cost:
        """`cost` with these weights read in each of `num_passes` passes, and `num_tokens` rows looked up."""
        read = Parts(
            attention=self.attention * num_passes,
            ffn=self.ffn * num_passes,
            head=self.head * num_passes,
            embeddings=self.row * num_tokens,
            scores=cost.bytes.scores,
        )
        return replace(cost, bytes=read)


class LlamaSide(Side):
    """llama.cpp with as many threads as torch has."""

    max_rows = 1

    def __init__(self, spec: SideSpec) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp")  # not among our dependencies
        path = Path(spec.model)
        self.weights = Weights.of(path)
        self.spec = replace(spec, dtype=self.weights.kind)
        self.geometry = Geometry.from_config(AutoConfig.from_pretrained(convert_gguf(path)))
        number = spec.threads or torch.get_num_threads()
        self.llama = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=spec.context,
            n_batch=BATCH,
            n_threads=number,
            n_threads_batch=number,
            n_gpu_layers=0 if spec.device == "cpu" else -1,
            verbose=False,
        )

    @contextmanager
    def session(self) -> Iterator[None]:
        """Nothing is needed."""
        yield

    def prefill(self, ids: torch.Tensor) -> int:
        """Read one prompt [1, T]."""
        self.llama.reset()
        self.llama.eval(ids[0].tolist())
        return self.llama.sample(temp=0.0)

    def decode(self, state: int) -> int:
        """Read one token."""
        self.llama.eval([state])
        return self.llama.sample(temp=0.0)

    def wait(self) -> None:
        """It returns when it is done: choosing a token needs the logits."""

    def spent(self, ids: torch.Tensor, num_steps: int) -> Spent:
        """By the formula, with the file's own sizes for the weights and a float16 cache."""
        dense = dense_spent(self.geometry, ids, num_steps, CACHE_BYTES)
        num_tokens = ids.shape[1]
        prefill = self.weights.bill(dense.prefill, 1, num_tokens)  # what must be read; it reads once a chunk
        return Spent(prefill, self.weights.bill(dense.decode, num_steps, num_steps), num_steps)
