"""What could a better router still win? The dial against two oracles that know the answer.

    python benchmarks/oracle.py demo --compute 0.9,0.8,0.7 --data novels.txt,wiki.txt --windows 8

Both oracles run every slice of every layer on every token, measure the error that it makes, and spend the same mean FFN
width as the dial did by one price for all layers:

- `error`: weighs a token's true errors with the layer's mean Fisher metric (what the routers are first taught);
- `damage`: weighs them with the token's own gradients, averaged over several of the model's own samples. The nearest to
  the truth that can be had, though with few samples it also profits a little from their noise's lucky side.

Their choices come from the dense model's stream, so neither is a strict bound. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

import rheostat
from rheostat import families
from rheostat.adapted import Adapted
from rheostat.eval.quality import Run, evaluate
from rheostat.meter import Meter
from rheostat.methods.dynamoe.difficulty import bound, fisher_root, slice_damages
from rheostat.methods.dynamoe.method import nested_ffns
from rheostat.methods.dynamoe.routing import choose_by_damage
from rheostat.methods.dynamoe.watching import frozen, recording
from rheostat.provenance import provenance
from rheostat.text import pack, read_texts


@dataclass(frozen=True)
class Watched:
    """One window seen by the dense model, by layer: what the FFN read [T, D] and gradients of samples [K, T, D]."""

    inputs: list[torch.Tensor]
    gradients: list[torch.Tensor]


def watch(adapted: Adapted, window: torch.Tensor, draws: int, generator: torch.Generator) -> Watched:
    """Inputs of every FFN, and gradients of `draws` sampled continuations at every position."""
    model = adapted.model
    with frozen(model), recording(model) as seen, torch.enable_grad():
        logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        found: list[list[torch.Tensor]] = [[] for _ in seen]
        for k in range(draws):
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            outputs = [record["y"] for record in seen]
            for layer, one in zip(found, torch.autograd.grad(loss, outputs, retain_graph=k + 1 < draws), strict=True):
                layer.append(one[0])
        return Watched([record["x"][0] for record in seen], [torch.stack(layer) for layer in found])


@torch.no_grad()
def damages(adapted: Adapted, one: Watched, roots: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Damage of every smaller slice, [L, T, E-1], as each oracle sees it."""
    by_error, by_damage = [], []
    for ffn, x, gradients, root in zip(nested_ffns(adapted.model), one.inputs, one.gradients, roots, strict=True):
        hidden, norm = ffn.mlp.hidden(x), torch.ones(len(x))
        by_error.append(slice_damages(ffn, hidden, bound("fisher", torch.nn.Identity(), norm, root=root)))
        drawn = [bound("fisher", torch.nn.Identity(), norm, gradient=gradient) for gradient in gradients]
        by_damage.append(torch.stack([slice_damages(ffn, hidden, draw) for draw in drawn]).mean(0))
    return {"error": torch.stack(by_error), "damage": torch.stack(by_damage)}


def choices(damage: torch.Tensor, shares: torch.Tensor, width: float) -> torch.Tensor:
    """Experts [W, L, T] for damages [W, L, T, E-1] at a mean width, by one price; first positions take the full FFN."""
    flat = damage.clamp(min=1e-30).log().flatten(0, 2)
    low, high = 1e-12, 1e6
    chosen = torch.empty(0)
    for _ in range(60):
        price = (low * high) ** 0.5
        chosen = choose_by_damage(flat, torch.full((len(flat),), price), shares).view(damage.shape[:3]).clone()
        chosen[:, :, 0] = len(shares) - 1
        low, high = (price, high) if float(shares[chosen].mean()) > width else (low, price)
    return chosen


def replayed(chosen: torch.Tensor) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """An override that hands out choices [W, L, T], window after window."""
    window = -1

    def override(layer: int, x: torch.Tensor) -> torch.Tensor:
        nonlocal window
        window += layer == 0
        return chosen[window, layer]

    return override


def measure(adapted: Adapted, windows: torch.Tensor, computes: list[float], draws: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for i, window in enumerate(windows):
        print(f"watching window {i + 1} of {len(windows)}", file=sys.stderr)
        seen.append(watch(adapted, window, draws, generator))
    num_layers = len(families.layers(adapted.model))
    roots = [fisher_root(torch.cat([one.gradients[i].flatten(0, 1) for one in seen])) for i in range(num_layers)]
    known = [damages(adapted, one, roots) for one in seen]
    shares = nested_ffns(adapted.model)[0].shares
    rows = []
    for compute in computes:
        meters: dict[str, Meter] = {}
        size = windows.shape[1]
        dial = evaluate(adapted, windows, [Run(label="dial", compute=compute)], batch_tokens=size, meters=meters)[1]
        rows.append({"kind": "dial", "asked": compute} | dial.to_dict())
        for kind in ("error", "damage"):
            table = torch.stack([one[kind] for one in known])
            chosen = choices(table, shares, dial.ffn_fraction)
            run = Run(label=kind, compute=compute, override=replayed(chosen))
            found = evaluate(adapted, windows, [run], batch_tokens=size)[1]
            rows.append({"kind": f"oracle by {kind}", "asked": compute} | found.to_dict())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--compute", default="0.9,0.8,0.7")
    parser.add_argument("--data", default="builtin:heldout", help="files of text, each measured on its own")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--draws", type=int, default=4, help="samples behind each gradient")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    adapted, tokenizer = rheostat.load(args.artifact)
    figures = {}
    for name in args.data.split(","):
        windows = pack(tokenizer, read_texts(name), length=args.length, limit=args.windows, seed=args.seed)
        figures[name] = measure(adapted, windows, [float(c) for c in args.compute.split(",")], args.draws, args.seed)
        print(f"\n{name}: {len(windows)} windows of {args.length}")
        for row in figures[name]:
            print(f"{row['asked']:g}  {row['kind']:<18} ffn {row['ffn_fraction']:.3f}  ratio {row['ratio']:.3f}")
    print(json.dumps({"texts": figures, "draws": args.draws, "provenance": provenance(seed=args.seed)}))


if __name__ == "__main__":
    main()
