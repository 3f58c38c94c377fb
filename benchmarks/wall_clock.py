"""Does the dial show on the clock? One prompt length, one dtype, all sides in turn: `rheostat bench` with fewer flags.

    python benchmarks/wall_clock.py demo --compute 1.0,0.7 --prompt 1024 --new 64 --rounds 7

The last line is one JSON object. docs/bench.md explains the figures.
"""

from __future__ import annotations

import argparse
import sys

from rheostat.__main__ import main as rheostat


def arguments(given: list[str]) -> list[str]:
    """Those of `rheostat bench`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--compute", default="1.0,0.7")
    parser.add_argument("--prompt", default="1024")
    parser.add_argument("--new", default="48")
    parser.add_argument("--rounds", default="7")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(given)
    same = [flag for name in ("compute", "new", "rounds", "dtype") for flag in (f"--{name}", getattr(args, name))]
    fewer = ["--prompts", args.prompt, "--batch", "1", "--stock", args.dtype, "--no-llama", "--no-memory", "--json"]
    return ["bench", args.artifact, *same, *fewer]


if __name__ == "__main__":
    sys.exit(rheostat(arguments(sys.argv[1:])))
