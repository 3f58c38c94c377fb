"""A report with everything in it, and one from before there was a format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from rheostat.report import to_json
from rheostat.report.schema import FILE, FORMAT

NASTY = "<script>alert('x')</script> | $a_b$ & \"q\""
"""A name that must not get through to a page as it is."""


def run(kind: str, asked: float, ratio: float, error: float = 0.01, **more: Any) -> dict[str, Any]:
    """One row of a text."""
    return {
        "label": f"{kind} {asked:g}",
        "kind": kind,
        "asked": asked,
        "compute": asked,
        "compute_with_context": asked + (1 - asked) / 10,
        "ffn_fraction": 1 - 1.7 * (1 - asked),
        "loss": 3.0,
        "loss_error": error,
        "perplexity": 20.0 * ratio,
        "ratio": ratio,
        "ratio_error": error,
        "accuracy": 0.4,
        "accuracy_error": 0.01,
        "agreement": 1.0 if kind == "dense" else 0.8,
        "agreement_error": 0.01,
        "flops_per_token": 2.7e8 * asked,
        "bytes_per_token": 5.5e8 * asked,
        "num_tokens": 1020,
        "seconds": 1.0,
        "tokens_per_second": 1020.0,
    } | more


def text(name: str = "words", *, scale: float = 1.0) -> dict[str, Any]:
    """One text: dense, two settings and their baselines, expert use, a passage."""
    runs = [run("dense", 1.0, 1.0, 0.0)]
    for asked, ratio in ((0.9, 1.05), (0.8, 1.2)):
        runs += [run("dial", asked, ratio * scale), run("static", asked, 1.3 * ratio), run("random", asked, 2 * ratio)]
    use = [
        {
            "asked": asked,
            "widths": [0.5, 1.0],
            "shares": [[0.25, 0.75], [0.6, 0.4], [0.0, 1.0]],
            "positions": {"starts": [0, 8, 16], "width": [[1.0, 0.8, 0.7], [0.9, None, 0.6], [1.0, 1.0, 1.0]]},
        }
        for asked in (0.9, 0.8)
    ]
    tokens = ["The", " river", "\n", "é<b>", "漢字"]
    passage = {
        "tokens": tokens,
        "rows": [{"asked": a, "compute": a, "widths": [1.0, 0.9, 0.5, 0.7, 0.6]} for a in (0.9, 0.8)],
    }
    return {
        "name": name,
        "windows": 4,
        "length": 256,
        "digest": f"digest of {name}",
        "runs": runs,
        "use": use,
        "passage": passage,
    }


def sample(*names: str, model: str = "models/dial", base: str = "b" * 64, scale: float = 1.0) -> dict[str, Any]:
    """A whole report on texts of these names."""
    return {
        "format": FORMAT,
        "model": model,
        "method": {"name": "some", "tile": 4},
        "base": {"name": "Tiny", "hub_id": "someone/Tiny", "license": "apache-2.0", "language": "en"},
        "geometry": {"num_layers": 3},
        "seed": 0,
        "texts": [text(name, scale=scale) for name in names or ("words", "others")],
        "provenance": {
            "command": "rheostat eval models/dial",
            "rheostat": "0.1.0",
            "commit": "abc",
            "seed": 0,
            "hardware": {"processor": "a | b", "cores": 2},
            "time": "2026-01-01T00:00:00+00:00",
            "artifact_digest": f"a of {model}",
            "base_digest": base,
        },
        "bench": [
            {"side": "stock", "compute": None, "tpot_ms": 70.0, "ttft_ms": None},
            *(
                {
                    "side": f"dial {c:g}",
                    "compute": c,
                    "ttft_ms": {"median": 900 * c, "low": 880 * c, "high": 990 * c},
                    "tpot_ms": {"median": 80 * c, "low": 78 * c, "high": 85 * c},
                    "tokens_per_s": 1000 / (80 * c),
                }
                for c in (1.0, 0.9, 0.8)
            ),
        ],
        "bench_provenance": {"command": "rheostat bench models/dial"},
        "tasks": [
            {
                "task": "quiz",
                "metric": "accuracy",
                "compute": c,
                "score": c / 2,
                "stderr": 0.02,
                "rows": 500,
                "paired_difference": c / 2 - 0.5,
                "paired_stderr": 0.01,
                "mode": "choice",
            }
            for c in (1.0, 0.8)
        ],
    }


def old_sample() -> dict[str, Any]:
    """As reports were before they had a format: quality and provenance alone."""
    report = copy.deepcopy(sample())
    for key in ("format", "base", "geometry", "bench", "bench_provenance", "tasks"):
        del report[key]
    for one in report["texts"]:
        for key in ("digest", "use", "passage"):
            del one[key]
        for row in one["runs"]:
            for key in ("accuracy_error", "agreement_error", "flops_per_token", "bytes_per_token"):
                del row[key]
    return report


def put(folder: Path, report: dict[str, Any]) -> None:
    """`report.json` alone, which is all that is read of a report: the pictures that `write` makes cost seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(to_json(report))
