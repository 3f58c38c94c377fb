"""Memory of a server over hundreds of requests: the same ones again and again, clients that leave among them.

python benchmarks/serve_soak.py smol-dial --rounds 10 --requests 60 --out soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from pathlib import Path
from typing import Any

import serving

from rheostat import report

CLIENTS = 16


def resident_mib(process_id: int) -> float:
    """Memory of a process, less what it has from files."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return sum(int(number) for number in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)) / 1024


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    args = parser.parse_args()
    port, log = serving.free_port(), args.out.with_suffix(".log")
    command = serving.ours(args.model, port, "--rows", "16", "--dtype", "bfloat16", "--weights", "int8")
    requests = serving.plan(args.requests, (1.0, 0.9, 0.8, 0.7), (8, 48), 0.1, 0)
    rounds: list[dict[str, Any]] = []
    with serving.serving(command, port, log) as base:
        serving.wait_up(base, log)
        process_id = serving.owner(port)
        for place in range(args.rounds):
            answers, _ = asyncio.run(
                serving.closed_loop(base, "dial", requests, CLIENTS, lambda one: {"compute": one.compute})
            )
            lost = sum(one.status not in (200, 499) for one in answers)
            rounds.append({"requests": (place + 1) * len(requests), "mib": resident_mib(process_id), "lost": lost})
            print(json.dumps(rounds[-1]), flush=True)
    args.out.write_text(report.to_json({"rounds": rounds, "provenance": report.origin(seed=0)}, indent=1))


if __name__ == "__main__":
    main()
