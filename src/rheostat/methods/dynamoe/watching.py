"""Looking into the dense model: its gradients under its own samples, and what its layers are called with.

Shapes: W windows, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.methods.base import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter wants a gradient and nothing drops out, until the block ends."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Keep of the newest pass, by layer: the FFN's input `x`, its output `y` (in the graph), and the
    `residual` norm."""
    layers = families.layers(model)
    seen: list[dict[str, torch.Tensor]] = [{} for _ in layers]
    handles = []

    def after_ffn(record: dict[str, torch.Tensor]) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            record["x"] = args[0].detach()
            if torch.is_grad_enabled() and not output.requires_grad:
                output = output.detach().requires_grad_(True)  # frozen weights: the graph begins here
            record["y"] = output
            return output

        return hook

    def before_norm(record: dict[str, torch.Tensor]) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor]) -> None:
            record["residual"] = args[0].detach().float().norm(dim=-1)

        return hook

    try:
        for layer, record in zip(layers, seen, strict=True):
            handles.append(layer.mlp.register_forward_hook(after_ffn(record)))  # type: ignore[union-attr]
            handles.append(families.pre_norm(model, layer).register_forward_pre_hook(before_norm(record)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sampled_gradients(
    model: PreTrainedModel,
    windows: torch.Tensor,
    generator: torch.Generator,
    progress: Progress,
    batch_tokens: int = 1024,
) -> list[torch.Tensor]:
    """Gradients of log-likelihoods of the model's own samples with respect to each FFN's output: the true Fisher's, not
    the empirical one's.

    Args:
        windows: [W, T]; may be empty.

    Returns:
        By layer, [W * (T - 1), D]; first positions are left out.
    """
    kept: list[list[torch.Tensor]] = [[] for _ in families.layers(model)]
    with recording(model) as seen, torch.enable_grad():
        for start, batch in _batches(windows, batch_tokens):
            progress("watching the dense model", start, len(windows))
            logits = model(input_ids=batch, use_cache=False).logits.flatten(0, 1).float()
            with torch.no_grad():
                chances = logits.softmax(-1).to(generator.device)  # where the lots are drawn is the generator's choice
                drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            for layer, gradient in zip(kept, torch.autograd.grad(loss, [s["y"] for s in seen]), strict=True):
                layer.append(gradient[:, 1:].flatten(0, 1))
    progress("watching the dense model", len(windows), len(windows))
    return [torch.cat(layer) if layer else torch.empty(0) for layer in kept]


def layer_arguments(
    model: PreTrainedModel, windows: torch.Tensor, batch_tokens: int
) -> tuple[list[dict[int, dict[str, Any]]], torch.Tensor]:
    """What the model passes to each layer, and the first layer's input.

    Windows have one length and no padding, so masks and positions are the same for all batches of a size.

    Returns:
        By layer, batch size -> keyword arguments; and the hidden states [W, T, D] that enter the first layer.
    """
    layers = families.layers(model)
    arguments: list[dict[int, dict[str, Any]]] = [{} for _ in layers]
    entering: list[torch.Tensor] = []

    def take(store: dict[int, dict[str, Any]]) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            store[len(hidden)] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

        return hook

    sizes = {len(batch): batch for _, batch in _batches(windows, batch_tokens)}
    handles = [
        layer.register_forward_pre_hook(take(store), with_kwargs=True)
        for layer, store in zip(layers, arguments, strict=True)
    ]
    try:
        for batch in sizes.values():
            families.decoder(model)(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    handle = layers[0].register_forward_pre_hook(_enter_and_stop(entering), with_kwargs=True)
    try:
        for _, batch in _batches(windows, batch_tokens):
            try:
                families.decoder(model)(input_ids=batch, use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return arguments, torch.cat(entering)


class _Stop(Exception):
    """Thrown in the first layer: what comes after is not wanted."""


def _enter_and_stop(entering: list[torch.Tensor]) -> Any:
    def hook(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    return hook


def _batches(windows: torch.Tensor, batch_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    if not len(windows):
        return
    step = max(1, batch_tokens // windows.shape[1])
    for start in range(0, len(windows), step):
        yield start, windows[start : start + step]
