"""What a host must have before an image is built: memory, disk, driver."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from sparktune.setup.machine.detect import existing_parent, host_memory_gib
from sparktune.setup.plan.errors import PreflightError

__all__ = ["check_build_host", "driver_cuda_version", "host_checks"]

_GIB = 2**30
DISK_GIB = 60.0
"""Base (about 20 GiB packed, 35 unpacked) and our layers, before the base is here."""
DISK_WITH_BASE_GIB = 15.0
"""Our layers, compilers' leftovers of the build stages included."""
MEMORY_GIB = 6.0
"""Four nvcc jobs (MAX_JOBS=4) at about 1.5 GiB each."""
DRIVER_CUDA = (13, 0)
Line = tuple[str, Literal["pass", "fail", "skip"], str]


def driver_cuda_version() -> tuple[int, int] | None:
    """Returns the newest CUDA that the driver serves, or None where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if done.returncode == 0 and found else None


def host_checks(client: Any, *, base_is_here: bool) -> list[Line]:
    """Returns (name, status, what was seen or what to do) of every check."""
    lines: list[Line] = []
    memory = host_memory_gib()
    lines.append(("memory", "pass", f"{memory:.1f} GiB free") if memory >= MEMORY_GIB else (
        "memory", "fail", f"A build needs {MEMORY_GIB:.0f} GiB of memory but {memory:.1f} GiB is free. Close what uses "
        "it, or free the page cache: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches"))
    data = existing_parent(Path(client.info().get("DockerRootDir") or "/var/lib/docker"))
    free, need = shutil.disk_usage(data).free / _GIB, DISK_WITH_BASE_GIB if base_is_here else DISK_GIB
    lines.append(("disk", "pass", f"{free:.0f} GiB free in {data}") if free >= need else (
        "disk", "fail", f"A build needs {need:.0f} GiB in the engine's folder {data} but {free:.0f} GiB is free. "
        "Free some (docker system df), or move the engine's data-root."))
    driver = driver_cuda_version()
    if driver is None:
        lines.append(("driver", "skip", "no NVIDIA driver answers here, so nothing can be tested on a GPU"))
    elif driver < DRIVER_CUDA:
        lines.append(("driver", "fail", f"The driver serves CUDA {driver[0]}.{driver[1]}; the image needs "
                      f"{DRIVER_CUDA[0]}.{DRIVER_CUDA[1]} or later. Update it: sudo apt-get install nvidia-driver-580"))
    else:
        lines.append(("driver", "pass", f"CUDA {driver[0]}.{driver[1]}"))
    return lines


def check_build_host(client: Any, *, base_is_here: bool) -> None:
    """Raises PreflightError with every reason why an image should not be built here."""
    wrong = [text for _, status, text in host_checks(client, base_is_here=base_is_here) if status == "fail"]
    if wrong:
        raise PreflightError("\n".join(wrong))
