"""How long an answer that is being written stands still while the server reads somebody else's long prompt: read in
pieces, and in one go.

    python benchmarks/serve_stall.py smol-dial --tokens 2000 --out stall.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import serving
from serving import Answer, Request

from rheostat import report

WRITER = Request("Write a long story about a river.", 1.0, 150, False)


async def longest_gap(base: str, num_tokens: int, place: int) -> dict[str, float]:
    """In ms: between two tokens of an answer before and after the long prompt comes, from that answer's first token to
    its last, and the long prompt's first token."""
    many = " ".join(f"{sentence} ({place}.{k})" for k, sentence in zip(range(400), itertools.cycle(serving.SENTENCES)))
    long = Request(many[: int(3.6 * num_tokens)], 1.0, 2, False)
    found = Answer(-1)
    async with httpx.AsyncClient(timeout=120) as client:
        writing = asyncio.create_task(serving.ask(client, base, "dial", WRITER, {"ignore_eos": True}, found))
        while not found.times or len(found.times) < 30:
            await asyncio.sleep(0.01)
        reader = await serving.ask(client, base, "dial", long, {"stream_options": {"include_usage": True}})
        await writing
    assert found.times
    assert reader.times
    assert reader.usage
    gaps = [after - before for before, after in itertools.pairwise(found.times)]
    return {
        "calm": 1e3 * max(gaps[5:25]),
        "longest": 1e3 * max(gaps[25:]),
        "answer": 1e3 * (found.times[-1] - found.times[0]),
        "first_token": 1e3 * reader.times[0],
        "prompt_tokens": reader.usage["prompt_tokens"],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2000, help="of the long prompt, about")
    parser.add_argument("--pieces", default="4096,512,256", help="values of --prefill-tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("stall.json"))
    args = parser.parse_args()
    figures: dict[str, Any] = {"provenance": report.origin(seed=0), "pieces": {}}
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        bases = {}
        for piece in args.pieces.split(","):
            port, log = serving.free_port(), args.out.with_suffix(f".{piece}.log")
            flags = ("--prefill-tokens", piece, "--dtype", "bfloat16", "--weights", "int8")
            bases[piece] = stack.enter_context(serving.serving(serving.ours(args.model, port, *flags), port, log))
        for piece, base in bases.items():  # which start side by side
            serving.wait_up(base, args.out.with_suffix(f".{piece}.log"))
        for place in range(args.rounds + 1):  # the first to warm up
            for piece, base in bases.items():
                one = asyncio.run(longest_gap(base, args.tokens, place))
                found.setdefault(piece, []).extend([one] if place else [])
            if place:  # each round, so that a run that is cut off has given what it found
                figures["rounds"], figures["pieces"] = place, {piece: medians(ones) for piece, ones in found.items()}
                args.out.write_text(report.to_json(figures, indent=1))
    for piece, one in figures["pieces"].items():
        print(piece, json.dumps(one))


def medians(ones: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure, and the longest gap of all."""
    found = {key: statistics.median(one[key] for one in ones) for key in ones[0]}
    return found | {"longest_of_all": max(one["longest"] for one in ones)}


if __name__ == "__main__":
    main()
