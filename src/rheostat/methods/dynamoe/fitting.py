"""The training-free adaptation: watch the dense model once, then solve each layer on its own.

Memory: activations of all layers are kept between the two steps, (1 + gradient_share) * N * D * L numbers in the
model's dtype (0.06 GB for each thousand tokens of SmolLM2-135M in float32), and one Gram matrix [F, F] at a time.

Shapes: N tokens, D model width, L layers, F FFN width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rheostat import families
from rheostat.methods.base import Progress
from rheostat.methods.dynamoe.difficulty import CRITERIA, NEEDS_GRADIENT, labels
from rheostat.methods.dynamoe.experts import down_of
from rheostat.methods.dynamoe.ffn import NestedFFN
from rheostat.methods.dynamoe.routing import Router
from rheostat.methods.dynamoe.solve import Moments, rank, refit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rheostat.methods.dynamoe.method import DynaMoE

MAX_WEIGHT = 10.0
"""No token weighs more than this many times the median in the least-squares fit: attention sinks would own it."""
ROUTER_BATCH = 1024
ROUTER_LEARNING_RATE = 3e-3


@dataclass
class Watched:
    """What one layer saw of the calibration tokens, first positions left out."""

    x: torch.Tensor
    """[N, D], inputs of the FFN."""
    residual: torch.Tensor
    """[N], norm of the residual stream that the output joins."""
    gradient: torch.Tensor | None
    """[M, D] for the first M tokens: gradient of the sampled log-likelihood with respect to the FFN's output."""


def fit(
    method: DynaMoE,
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, Any]:
    """See `DynaMoE.fit`. Returns mean damage of each slice and the router's fit, by layer."""
    nested = [layer.mlp for layer in families.layers(model)]
    num_gradient = 0
    if method.criterion in NEEDS_GRADIENT:
        num_gradient = max(1, round(len(windows) * method.gradient_share))
    watched = watch(model, windows.to(model.device), num_gradient, generator, progress)
    figures = []
    for i, ffn in enumerate(nested):
        progress("solving layers", i, len(nested))
        figures.append(_fit_layer(method, model, i, ffn, watched[i], generator))
        watched[i] = None  # type: ignore[call-overload]  # free it: the next layer needs the room
    progress("solving layers", len(nested), len(nested))
    return {"num_tokens": windows.numel(), "num_gradient_windows": num_gradient, "layers": figures}


# -- watching


def watch(
    model: PreTrainedModel,
    windows: torch.Tensor,
    num_gradient: int,
    generator: torch.Generator,
    progress: Progress,
    batch_tokens: int = 1024,
) -> list[Watched]:
    """Run the dense model over windows [N, T]; gradients are taken on the first `num_gradient` of them."""
    num_layers = len(families.layers(model))
    step = max(1, batch_tokens // windows.shape[1])
    kept: list[tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]] = [([], [], []) for _ in range(num_layers)]
    with _frozen(model), recording(model) as seen:
        for start in range(0, len(windows), step):
            progress("watching the dense model", start, len(windows))
            stop = min(start + step, num_gradient) if start < num_gradient else start + step
            batch = windows[start : min(stop, start + step)]
            if start < num_gradient:
                _backward_of_own_samples(model, batch, generator)
                if stop < start + step:  # the batch was cut at the last gradient window: run its rest without
                    _store(seen, kept, with_gradient=True)
                    batch = windows[stop : start + step]
                    if len(batch):
                        with torch.no_grad():
                            families.decoder(model)(batch, use_cache=False)
                        _store(seen, kept, with_gradient=False)
                    continue
            else:
                with torch.no_grad():
                    families.decoder(model)(batch, use_cache=False)
            _store(seen, kept, with_gradient=start < num_gradient)
    progress("watching the dense model", len(windows), len(windows))
    return [Watched(torch.cat(x), torch.cat(r), torch.cat(g) if g else None) for x, r, g in kept]


def _store(seen: list[dict[str, torch.Tensor]], kept: list[Any], *, with_gradient: bool) -> None:
    for layer, (xs, residuals, gradients) in zip(seen, kept, strict=True):
        xs.append(layer["x"][:, 1:].flatten(0, 1))
        residuals.append(layer["residual"][:, 1:].flatten(0, 1))
        if with_gradient:
            gradient = layer["y"].grad
            assert gradient is not None
            gradients.append(gradient[:, 1:].flatten(0, 1))
        layer.clear()


def _backward_of_own_samples(model: PreTrainedModel, batch: torch.Tensor, generator: torch.Generator) -> None:
    """Backward of the log-likelihood of tokens drawn from the model's own predictions: the true Fisher, not the empirical one."""
    with torch.enable_grad():
        logits = model(input_ids=batch, use_cache=False).logits.flatten(0, 1).float()
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
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
    """Keep each FFN's input, its output (with its gradient) and the residual norm of the newest pass."""
    layers = families.layers(model)
    seen: list[dict[str, torch.Tensor]] = [{} for _ in layers]
    handles = []

    def after_ffn(record: dict[str, torch.Tensor]) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            record["x"] = args[0].detach()
            if torch.is_grad_enabled():
                output = output if output.requires_grad else output.detach().requires_grad_(True)
                output.retain_grad()
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


# -- solving


@torch.no_grad()
def _fit_layer(
    method: DynaMoE,
    model: PreTrainedModel,
    index: int,
    ffn: NestedFFN,
    watched: Watched,
    generator: torch.Generator,
) -> dict[str, Any]:
    x, residual = watched.x.float(), watched.residual.clamp(min=1e-12)
    down = ffn.mlp.down.weight.float().clone()
    hidden = _hidden(ffn, x)
    weight = residual.square().reciprocal()
    weight = weight.clamp(max=weight.median() * MAX_WEIGHT)
    moments = Moments.of(hidden, weight)
    gradient = None if watched.gradient is None else watched.gradient.float()
    metric = None if gradient is None else gradient.T @ gradient / len(gradient)
    order = rank(method.ranking, moments, down, metric)
    fits = []
    if method.refit:
        for size in ffn.sizes[:-1]:
            fits.append(refit(moments, down, order[:size], method.ridge, has_bias=method.refit_bias))

    ffn.mlp.reorder(order)
    ffn.order.copy_(ffn.order[order])
    if fits:
        ffn.add_downs(has_bias=method.refit_bias)
        for linear, (w, b) in zip(ffn.downs, fits, strict=True):
            linear.weight.copy_(w)  # type: ignore[union-attr,operator]
            if b is not None:
                linear.bias.copy_(b)  # type: ignore[union-attr,operator]

    # The router learns where gradients are known, or everywhere when the criterion needs none.
    num_labelled = len(x) if gradient is None else len(gradient)
    hidden = hidden[:num_labelled, order]
    contribute = families.contribution(model, families.layers(model)[index])
    damage = slice_damages(ffn, method.criterion, hidden, residual[:num_labelled], gradient, contribute)
    ffn.mean_damage.copy_(damage.mean(0))
    final = fit_router(
        ffn.router, x[:num_labelled], damage, method.target, method.tolerance, method.router_steps, generator
    )
    return {"mean_damage": damage.mean(0).tolist(), "router_loss": final}


@torch.no_grad()
def slice_damages(
    ffn: NestedFFN,
    criterion: str,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    gradient: torch.Tensor | None,
    contribute: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Damage [N, E-1] that each smaller slice does to tokens with hidden activations [N, F].

    Args:
        residual: [N], norm of the residual stream.
        gradient: [N, D], for a criterion that needs it.
        contribute: from the FFN's output to what joins the stream; the residual criterion compares there.
    """
    dtype = ffn.mlp.down.weight.dtype
    hidden = hidden.to(dtype)
    full = nn.functional.linear(hidden, ffn.mlp.down.weight)
    in_stream = contribute if criterion == "residual" else lambda y: y
    full = in_stream(full).float()
    damages = []
    for expert, size in enumerate(ffn.sizes[:-1]):
        small = nn.functional.linear(hidden[:, :size], *down_of(ffn.mlp, ffn.downs, expert, size))
        damages.append(CRITERIA[criterion](in_stream(small).float(), full, residual[:, None], gradient))
    return torch.stack(damages, 1)


def _hidden(ffn: NestedFFN, x: torch.Tensor, rows: int = 4096) -> torch.Tensor:
    """Hidden activations [N, F] in float32, in pieces to keep the temporaries small."""
    dtype = ffn.mlp.down.weight.dtype
    return torch.cat([ffn.mlp.hidden(piece.to(dtype)).float() for piece in x.split(rows)])


def router_loss(scores: torch.Tensor, damage: torch.Tensor, target: str, tolerance: float) -> torch.Tensor:
    """How wrong the router's scores [N, outputs] are about the damage [N, E-1].

    For `damage`, the deviance of a gamma distribution: its minimum is the conditional mean even where single damages are
    noisy, which a squared error of logarithms is not. For `class`, cross-entropy with the thresholded labels.
    """
    if target == "class":
        return torch.nn.functional.cross_entropy(scores, labels(damage, tolerance))
    return (damage.clamp(min=0) * (-scores).exp() + scores).mean()


@torch.enable_grad()
def fit_router(
    router: Router,
    x: torch.Tensor,
    damage: torch.Tensor,
    target: str,
    tolerance: float,
    steps: int,
    generator: torch.Generator,
) -> float:
    """Train one router on inputs [N, D] and damages [N, E-1]. Starts from the mean damage; returns the last loss.

    Inputs are standardised while training; the scaling is folded into the first layer afterwards.
    """
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    twin = Router(x.shape[1], router.inner.out_features, router.outer.out_features).to(x.device)
    _init_inner(twin, generator)
    with torch.no_grad():
        if target == "damage":
            twin.outer.bias.copy_(damage.mean(0).clamp(min=1e-12).log())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=ROUTER_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    last = float("nan")
    for _ in range(steps):
        pick = torch.randint(len(x), (min(ROUTER_BATCH, len(x)),), generator=generator).to(x.device)
        loss = router_loss(twin((x[pick] - mean) / scale), damage[pick], target, tolerance)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = float(loss.detach())
    with torch.no_grad():
        weight = twin.inner.weight / scale
        router.inner.weight.copy_(weight)
        router.inner.bias.copy_(twin.inner.bias - weight @ mean)
        router.outer.weight.copy_(twin.outer.weight)
        router.outer.bias.copy_(twin.outer.bias)
    return last


@torch.no_grad()
def _init_inner(router: Router, generator: torch.Generator) -> None:
    """Uniform in +-1/sqrt(D), drawn from our own generator so that a seed fixes the whole fit."""
    bound = router.inner.in_features**-0.5
    for tensor in (router.inner.weight, router.inner.bias):
        drawn = torch.rand(tensor.shape, generator=generator)
        tensor.copy_((drawn * 2 - 1) * bound)
