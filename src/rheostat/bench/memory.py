"""Peak memory of one side, in a process of its own: what other sides and the loading left behind is not counted.

    python -m rheostat.bench.memory < request.json

reads `{"spec": ..., "token_ids": [[...]], "new": N, "threads": n}` and writes one JSON object as its last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rheostat.bench.sides import SideSpec, make_side, once
from rheostat.bench.timing import threads

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
PEAK, NOW = "VmHWM", "VmRSS"


def measure_memory(spec: SideSpec, ids: torch.Tensor, new: int, num_threads: int) -> dict[str, Any]:
    """Bytes that a side holds once loaded, and at most while it answers the prompts [B, T] with `new` tokens.

    Returns:
        `loaded_bytes`, `peak_bytes`, `is_whole` (the peak could not be separated from that of loading) and `of`
        (`process`, or `device` for an accelerator's own memory). Empty with `error` where the process failed.
    """
    settings = {key: value for key, value in spec.to_dict().items() if key != "label"}
    request = {"spec": settings, "token_ids": ids.tolist(), "new": new, "threads": num_threads}
    done = subprocess.run(
        [sys.executable, "-m", "rheostat.bench.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what standard input asks for."""
    request = json.load(sys.stdin)
    spec = SideSpec(**request["spec"])
    with threads(request["threads"]):
        print(json.dumps(_measure(spec, torch.tensor(request["token_ids"]), request["new"])))


def _measure(spec: SideSpec, ids: torch.Tensor, new: int) -> dict[str, Any]:
    side = make_side(spec)
    if spec.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(spec.device)
        loaded = torch.cuda.memory_allocated(spec.device)
        once(side, ids.to(spec.device), new)
        peak = torch.cuda.max_memory_allocated(spec.device)
        return {"loaded_bytes": loaded, "peak_bytes": peak, "is_whole": False, "of": "device"}
    is_reset = forget_peak()
    loaded = resident(NOW)
    once(side, ids, new)
    return {"loaded_bytes": loaded, "peak_bytes": resident(PEAK), "is_whole": not is_reset, "of": "process"}


def forget_peak() -> bool:
    """Let the peak begin anew from what is held now. Returns whether the system can do that."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def resident(what: str) -> int:
    """Bytes of this process in memory: `NOW`, or its `PEAK`.

    From /proc where there is one: `getrusage` in a new process starts from the memory of the one that started it.
    """
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


if __name__ == "__main__":
    main()
