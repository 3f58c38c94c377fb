"""Looking into a pass: the keys and values that each layer makes.

Shapes: B rows, T tokens, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def recording(model: PreTrainedModel, first: int) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """Keep of the newest pass, under ("keys", layer) and ("values", layer), what each layer from `first` on made of its
    own, raw, [B, T, K * d]."""
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def see(kind: str, tensor: torch.Tensor) -> None:
            seen[kind, layer] = tensor

        return see

    handles: list[Any] = []
    try:
        for one in families.key_values(model)[first:]:
            handles += one.watch(keep(one.layer))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
