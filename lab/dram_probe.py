"""May this machine's DRAM counters be read? Asks CUPTI (through PyTorch's profiler) and ncu for the bytes of one copy.

usage: python -m lab.dram_probe
A copy of 1 GiB moves 2 GiB. Where neither tool may count, bytes are counted from tensors instead (lab/profile.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["main"]

METRICS = ["dram__bytes_read.sum", "dram__bytes_write.sum"]
COPY = ("import torch; x = torch.empty(2**30, dtype=torch.int8, device='cuda'); y = torch.empty_like(x); "
        "y.copy_(x); torch.cuda.synchronize()")


def through_cupti() -> dict[str, object]:
    """Returns what PyTorch's profiler reads through CUPTI's range profiler: metric -> value, or the reason."""
    from torch._C._profiler import _ExperimentalConfig

    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    config = _ExperimentalConfig(profiler_metrics=METRICS, profiler_measure_per_kernel=True)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA], experimental_config=config
        ) as profiler:
            target.copy_(source)
            torch.cuda.synchronize()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = [e["args"] for e in events if any(metric in str(e.get("args")) for metric in METRICS)]
    return {"counted": bool(found), "events": found[:3]}


def through_ncu() -> dict[str, object]:
    """Returns whether ncu is installed and may count, with its last line."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"counted": False, "reason": "ncu is not installed"}
    done = subprocess.run([tool, "--metrics", ",".join(METRICS), sys.executable, "-c", COPY], capture_output=True,
                          text=True, timeout=120, check=False)
    counted = done.returncode == 0 and METRICS[0] in done.stdout
    return {"counted": counted, "reason": "" if counted else (done.stdout + done.stderr).strip()[-300:]}


def main() -> int:
    """Prints one JSON line a tool; exits 3 without a GPU."""
    if not torch.cuda.is_available():
        print("The probe reads a CUDA GPU's counters; torch sees none here.", file=sys.stderr)
        return 3
    print(json.dumps({"tool": "ncu", **through_ncu()}))
    print(json.dumps({"tool": "CUPTI through torch.profiler", **through_cupti()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
