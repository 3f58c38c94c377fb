"""The training-free adaptation: one look at the dense model's gradients, then layer after layer, first to last.

Each layer is solved on the stream of hidden states that the layers before it, as adapted, hand on, because that is
what it will see. All of this is our choice.

Memory: the gradients (gradient_share * N * D * L numbers in the model's dtype: 0.03 GB for each thousand tokens of
SmolLM2-135M in float32), and for one layer at a time its activations [N, F] and Gram matrix [F, F].

Shapes: W windows, T tokens, N = W * (T - 1) tokens (first positions are left out), D model width, L layers, F FFN
width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.methods.base import Progress
from rheostat.methods.dynamoe.difficulty import NEEDS_GRADIENT, bound, fisher_root, slice_damages
from rheostat.methods.dynamoe.ffn import NestedFFN
from rheostat.methods.dynamoe.fit_router import fit_router
from rheostat.methods.dynamoe.keeping import keep, restore
from rheostat.methods.dynamoe.solve import Moments, rank, refit
from rheostat.methods.dynamoe.watching import frozen, layer_arguments, sampled_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rheostat.methods.dynamoe.method import DynaMoE

MAX_WEIGHT = 10.0
"""No token weighs more than this many times the median in the least-squares fit: attention sinks would own it."""
STREAM_SHARES = (1.0, 0.85, 0.7, 0.55)
"""Mean widths at which the windows of the adapted stream run, in turn: the drift that later layers learn to
live with."""
BATCH_TOKENS = 2048


def fit(
    method: DynaMoE,
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    generator: torch.Generator,
    progress: Progress,
    work_dir: Path | None = None,
    only_routers: bool = False,
) -> dict[str, Any]:
    """See `DynaMoE.fit`. Returns mean damage of each slice and the router's last loss, by layer.

    Args:
        only_routers: leave channels and down projections as they are, and fit the routers to what the slices now
            cost: for after a training that moved the weights away from what the routers had learnt.
    """
    windows = windows.to(model.device)
    num_gradient = 0
    if method.criterion in NEEDS_GRADIENT:
        # Routers learn from tokens with gradients and from no others.
        num_gradient = len(windows) if only_routers else max(1, round(len(windows) * method.gradient_share))
    figures = []
    with frozen(model):
        gradients = sampled_gradients(model, windows[:num_gradient], generator, progress)
        with torch.no_grad():
            arguments, stream = layer_arguments(model, windows, BATCH_TOKENS)
            num_layers = len(families.layers(model))
            for i in range(num_layers):
                progress("solving layers", i, num_layers)
                gradient = gradients[i] if num_gradient else None
                file = None if work_dir is None else work_dir / f"layer-{i:03}.safetensors"
                solve = _solve_router if only_routers else _solve
                stream, facts = _fit_layer(method, model, i, stream, arguments[i], gradient, generator, file, solve)
                figures.append(facts)
                if num_gradient:
                    gradients[i] = torch.empty(0)  # free it: the next layer needs the room
            progress("solving layers", num_layers, num_layers)
    return {"num_tokens": windows.numel(), "num_gradient_windows": num_gradient, "layers": figures}


def _fit_layer(
    method: DynaMoE,
    model: PreTrainedModel,
    index: int,
    stream: torch.Tensor,
    arguments: dict[int, dict[str, Any]],
    gradient: torch.Tensor | None,
    generator: torch.Generator,
    file: Path | None,
    solve: Callable[..., dict[str, Any]],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Solve one layer on the stream [W, T, D], or take what `file` kept of it, and carry the stream through it."""
    layer = families.layers(model)[index]
    ffn: NestedFFN = layer.mlp  # type: ignore[assignment]
    contribute = families.contribution(model, layer)
    after, middle, x = _through(model, layer, stream, arguments)
    facts = None if file is None else restore(file, ffn, generator, has_bias=method.refit_bias)
    if facts is None:
        facts = solve(method, ffn, contribute, middle, x, gradient, generator)
        if file is not None:
            keep(file, ffn, facts, generator)
    if not method.sequential:
        return after, facts
    choice = _stream_choice(ffn, x)
    y = ffn.run(x.flatten(0, 1), choice.flatten()).view_as(x)
    return middle + contribute(y), facts


def _solve(
    method: DynaMoE,
    ffn: NestedFFN,
    contribute: Callable[[torch.Tensor], torch.Tensor],
    middle: torch.Tensor,
    x: torch.Tensor,
    gradient: torch.Tensor | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Order, down projections and router of one layer.

    Args:
        contribute: from the FFN's output to what joins the stream.
        middle: [W, T, D], the residual stream before the FFN's norm.
        x: [W, T, D], what the FFN reads.
        gradient: [n, D] for the first n tokens, where the criterion needs it.
    """
    inside, norm = _tokens(x, middle)
    weight = norm.square().reciprocal()
    weight = weight.clamp(max=weight.median() * MAX_WEIGHT)
    hidden = _hidden(ffn, inside)
    down = ffn.mlp.down.weight.float().clone()  # the original order: `reorder` works in place
    root = None if gradient is None else fisher_root(gradient.float())

    moments = Moments.of(hidden, hidden @ down.T, weight)
    order = rank(method.ranking, moments, down, root)
    ffn.mlp.reorder(order)
    ffn.order.copy_(ffn.order[order])
    if method.refit:
        ffn.add_downs(has_bias=method.refit_bias)
        for expert, size in enumerate(ffn.sizes[:-1]):
            kept = order[:size]
            fitted = refit(moments.kept(kept), method.ridge, start=down[:, kept], has_bias=method.refit_bias)
            ffn.set_down(expert, *fitted)

    num_labelled = len(inside) if gradient is None else len(gradient)
    labelled = (hidden[:num_labelled, order], inside[:num_labelled], norm[:num_labelled])
    return _teach(method, ffn, contribute, *labelled, gradient, root, generator)


def _solve_router(
    method: DynaMoE,
    ffn: NestedFFN,
    contribute: Callable[[torch.Tensor], torch.Tensor],
    middle: torch.Tensor,
    x: torch.Tensor,
    gradient: torch.Tensor | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    """The router of one layer whose slices stay: arguments as of `_solve`, with the gradients of all tokens."""
    inside, norm = _tokens(x, middle)
    root = None if gradient is None else fisher_root(gradient.float())
    return _teach(method, ffn, contribute, _hidden(ffn, inside), inside, norm, gradient, root, generator)


def _tokens(x: torch.Tensor, middle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the FFN reads [N, D], and the norm of the residual stream before it [N], both without first positions."""
    norm = middle[:, 1:].flatten(0, 1).float().norm(dim=-1).clamp(min=1e-12)
    return x[:, 1:].flatten(0, 1).float(), norm


def _teach(
    method: DynaMoE,
    ffn: NestedFFN,
    contribute: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    inside: torch.Tensor,
    norm: torch.Tensor,
    gradient: torch.Tensor | None,
    root: torch.Tensor | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Damages, and the router that learns them, on the tokens whose gradients are known (on all, if none are needed).

    Args:
        hidden: [n, F], in the order of the slices.
        inside, norm: see `_tokens`, for the same n tokens.
        gradient, root: [n, D] and its Fisher root, where the criterion needs them.
    """
    damage = slice_damages(ffn, hidden, bound(method.criterion, contribute, norm, root=root))
    draws = None
    if gradient is not None:
        draws = slice_damages(ffn, hidden, bound(method.criterion, contribute, norm, gradient=gradient.float()))
    router = (method.target, method.tolerance, method.router_steps, generator)
    loss = fit_router(ffn.router, inside, damage, *router, draws=draws)
    damage = damage if draws is None else draws
    ffn.mean_damage.copy_(damage.mean(0))
    return {"mean_damage": damage.mean(0).tolist(), "router_loss": loss}


def _through(
    model: PreTrainedModel, layer: Any, stream: torch.Tensor, arguments: dict[int, dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stream [W, T, D] through one layer with its full FFN: after it, before its FFN's norm, and what the
    FFN read."""
    middles, inputs, outputs = [], [], []
    handles = [
        families.pre_norm(model, layer).register_forward_pre_hook(lambda _, args: middles.append(args[0])),
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
    ]
    try:
        for batch in stream.split(max(1, BATCH_TOKENS // stream.shape[1])):
            out = layer(batch, **arguments[len(batch)])
            outputs.append(out[0] if isinstance(out, tuple) else out)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(outputs), torch.cat(middles), torch.cat(inputs)


def _hidden(ffn: NestedFFN, x: torch.Tensor, rows: int = 4096) -> torch.Tensor:
    """Hidden activations [N, F] in float32, in pieces to keep the temporaries small."""
    dtype = ffn.mlp.down.weight.dtype
    return torch.cat([ffn.mlp.hidden(piece.to(dtype)).float() for piece in x.split(rows)])


def _stream_choice(ffn: NestedFFN, x: torch.Tensor) -> torch.Tensor:
    """Experts [W, T] for the adapted stream: each window at one of `STREAM_SHARES`, by a setting found for
    this layer."""
    choice = torch.full(x.shape[:2], len(ffn.sizes) - 1, device=x.device)
    for k, share in enumerate(STREAM_SHARES):
        rows = x[k :: len(STREAM_SHARES)]
        if share == 1.0 or not len(rows):
            continue
        scores = ffn.router(rows.flatten(0, 1))
        low, high = 1e-9, 1e9 if ffn.target == "damage" else 1.0
        for _ in range(30):  # bisect the setting in its logarithm
            setting = (low * high) ** 0.5
            chosen = ffn.decide(scores, torch.full((len(scores),), setting, device=x.device))
            low, high = (setting, high) if float(ffn.shares[chosen].mean()) > share else (low, setting)
        choice[k :: len(STREAM_SHARES)] = chosen.view(rows.shape[:2])
    choice[:, 0] = len(ffn.sizes) - 1
    return choice
