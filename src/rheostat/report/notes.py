"""What a reader has to know before believing the figures, in sentences, from the report alone."""

from __future__ import annotations

from rheostat.report.curves import clocks
from rheostat.report.schema import Report, Text

FEW_WINDOWS = 8
"""Below this many windows a standard error is itself hardly known."""
OFF = 0.015
"""A setting that spent this much more or less than asked is worth a sentence."""


def method_name(report: Report) -> str:
    """The name of the method."""
    return str(report["method"]["name"])


def measured(text: Text) -> str:
    """How much text it was."""
    num_tokens = text["runs"][0]["num_tokens"]
    return f"{text['windows']} windows of {text['length']} tokens, {num_tokens:,} predicted tokens"


def notes(report: Report) -> list[str]:
    """Sentences on what was measured, how, and how sure it is."""
    return [*_on_quality(report), *_on_cost(report), *_on_origin(report)]


def _on_quality(report: Report) -> list[str]:
    if not report["texts"]:
        return []
    found = [
        "Every figure comes from forward passes under the dial, reading included. All runs saw the same windows: "
        "the ± of a ratio is one standard error of the paired difference to dense, over windows."
    ]
    few = min(text["windows"] for text in report["texts"])
    if few < FEW_WINDOWS:
        found.append(
            f"With {few} windows the standard errors are rough themselves; measure more before relying on them."
        )
    kinds = {run["kind"] for text in report["texts"] for run in text["runs"]}
    if "static" in kinds:
        found.append("The static baseline is the best fixed width for each layer at the same mean compute.")
    if "random" in kinds:
        found.append("The random baseline draws experts by lot, with the same use of each in each layer.")
    found += [line for text in report["texts"] for line in _unbeaten(text)]
    found += [line for text in report["texts"] for line in _off_target(text)]
    return found


def _unbeaten(text: Text) -> list[str]:
    """Settings where the dial is not clearly better than a baseline."""
    dials = {run["asked"]: run for run in text["runs"] if run["kind"] == "dial"}
    lines = []
    for rival in text["runs"]:
        dial = dials.get(rival["asked"])
        if rival["kind"] in ("dense", "dial") or dial is None or dial["ratio"] is None or rival["ratio"] is None:
            continue
        if dial["ratio"] + (dial["ratio_error"] or 0) >= rival["ratio"] - (rival["ratio_error"] or 0):
            lines.append(
                f"On {text['name']} at {rival['asked']:g} the dial is not clearly better than the {rival['kind']} "
                "baseline: the error bars meet."
            )
    return lines


def _off_target(text: Text) -> list[str]:
    off = [
        f"{run['compute']:.3f} for {run['asked']:g}"
        for run in text["runs"]
        if run["kind"] == "dial" and abs(run["compute"] - run["asked"]) > OFF
    ]
    if not off:
        return []
    return [
        f"On {text['name']} the compute spent differs from what was asked ({', '.join(off)}): the dial was measured "
        "on other text. Compare by what was spent."
    ]


def _on_cost(report: Report) -> list[str]:
    found = [
        "Compute counts the FLOPs of all products with weights, routers and output head included; attention over the "
        "context is counted beside it."
    ]
    if any(run.get("bytes_per_token") for text in report["texts"] for run in text["runs"]):
        found.append(
            "Bytes are counted from the model's sizes, not measured: weights, and the cache of a full window, that "
            "decoding one token in a batch of one moves at the mean compute spent. A batch shares what it reads."
        )
    if clocks(report):
        found.append("Times are medians, with quartiles in brackets. They hold for the machine they were taken on.")
    else:
        found.append("No times were measured here. FLOPs and bytes are not milliseconds.")
    return found


def _on_origin(report: Report) -> list[str]:
    found = []
    if report["format"] == 0:
        found.append("This report was written before reports had a format number; what it lacks is left out.")
    commit = report.get("provenance", {}).get("commit")
    if isinstance(commit, str) and commit.endswith("+"):
        found.append(f"The source tree had changes that are not in commit {commit.rstrip('+')}.")
    return found
