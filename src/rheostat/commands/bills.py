"""The bill at the end of an answer: what it cost, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rheostat import terminal

if TYPE_CHECKING:
    from rheostat.meter import Meter


def make_bill(meter: Meter, num_prompt_tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    """The figures of one answer, whose tokens took `seconds`; none of them is empty."""
    later = seconds[1:]
    return {
        "prompt_tokens": num_prompt_tokens,
        "new_tokens": len(seconds),
        "compute": meter.compute,
        "compute_with_context": meter.compute_with_context,
        "ffn_fraction": meter.ffn_fraction,
        "layer_fractions": meter.layer_fractions(),
        "flops": meter.cost.flops.total,
        "dense_flops": meter.dense.flops.total,
        "cost": meter.cost.to_dict(),
        "dense_cost": meter.dense.to_dict(),
        "first_token_ms": 1e3 * seconds[0],
        "ms_per_token": 1e3 * sum(later) / len(later) if later else None,
        "speculation": meter.speculation.to_dict() if meter.speculation.num_rounds else None,
    }


def show_bill(answer: dict[str, Any]) -> None:
    """Print the bill of an answer."""
    bill = answer["bill"]
    out = terminal.console()
    flops, dense = terminal.short(bill["flops"]), terminal.short(bill["dense_flops"])
    speed = "" if bill["ms_per_token"] is None else f", then {bill['ms_per_token']:.1f} ms a token"
    out.print()
    out.print(f"tokens   {bill['prompt_tokens']} in, {bill['new_tokens']} out")
    out.print(
        f"compute  {bill['compute']:.3f} of dense spent, {asked(answer['asked'])} asked "
        f"({bill['compute_with_context']:.3f} with attention over the context)"
    )
    out.print(f"flops    {flops}, dense {dense}")
    layers = bill["layer_fractions"]
    out.print(
        f"width    {bill['ffn_fraction']:.0%} of the FFN"
        + (f", by layer {terminal.sparkline(layers)}" if layers else "")
    )
    if drafts := bill["speculation"]:
        places = ", ".join(f"{share:.0%}" for share in drafts["acceptance_by_place"])
        rate = f"{drafts['tokens_per_round']:.2f} tokens a round"
        out.print(f"drafts   {drafts['accepted']} of {drafts['drafted']} accepted, by place {places or '-'}; {rate}")
        if drafts["verdict"]:
            out.print(f"         {drafts['verdict']}")
    out.print(f"time     {bill['first_token_ms']:.0f} ms to the first token{speed} ({answer['runtime']})")


def asked(compute: dict[str, float]) -> str:
    """What was asked of the phases, in words."""
    if compute["prefill"] == compute["decode"]:
        return f"{compute['decode']:g}"
    return f"{compute['prefill']:g} for the prompt and {compute['decode']:g} for the answer"
