"""The doctor's checks of the host: system, driver, container toolkit, engine, clocks, page cache, hub, leftovers."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from sparktune.setup.machine.backends import program_root
from sparktune.setup.machine.check import Check
from sparktune.setup.machine.detect import nvidia_gpus
from sparktune.setup.machine.gauges import meminfo_gib, query_gpu
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.schema import Plan

__all__ = [
    "check_clocks", "check_driver", "check_engine", "check_hub", "check_leftovers", "check_os", "check_page_cache",
    "check_shadowed", "check_specs", "check_token", "check_toolkit", "hub_answers",
]

_CUDA13_DRIVER = 580
"""The first driver series of CUDA 13, which the image's base is built with."""
_HUB_S = 5.0
_STALE_CACHE_GIB = 20.0
_HOT_C = 87.0
_SHADOWING = (
    "kernels", "torch", "triton", "transformers", "tokenizers", "peft", "datasets", "safetensors", "numpy", "yaml",
    "rich", "docker", "unsloth", "trl", "accelerate",
)
"""Packages that a file or folder of the same name in the working directory would pose as."""
_reached: dict[str, bool] = {}


def check_os(plan: Plan) -> Check:
    """Names the system; anything but Linux on x86-64 or arm64 is not supported."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = platform.system()
    dgx = "; DGX OS" if Path("/etc/dgx-release").is_file() else ""
    seen = f"{name}{dgx}, kernel {platform.release()}, {platform.machine()}"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64", "arm64"):
        return Check(name="os", status="warning", seen=seen, fix="Only Linux on x86_64 and aarch64 is tested.")
    return Check(name="os", status="ok", seen=seen)


def _cuda_of_driver() -> str | None:
    try:
        answer = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    _, found, rest = answer.partition("CUDA Version:")
    return rest.split()[0] if found and rest.split() else None


def check_driver(plan: Plan) -> Check:
    """Names driver and CUDA; the image's CUDA 13 wants a driver of series 580 or newer."""
    gpus = nvidia_gpus()
    if not gpus:
        return Check(name="driver", status="ok", seen="no NVIDIA GPU answers, none is needed")
    version = (query_gpu("driver_version") or ["unknown"])[0]
    seen = f"NVIDIA {version}, CUDA {_cuda_of_driver() or 'unknown'}"
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < _CUDA13_DRIVER:
        return Check(
            name="driver", status="warning", seen=seen,
            fix=f"The image's CUDA 13 wants a driver of series {_CUDA13_DRIVER} or newer: sudo apt-get install "
            f"nvidia-driver-{_CUDA13_DRIVER}-open, then reboot.",
        )
    return Check(name="driver", status="ok", seen=seen)


def check_toolkit(plan: Plan) -> Check:
    """Looks for NVIDIA's container toolkit, which gives containers the GPU."""
    if plan.backend == "local" or not nvidia_gpus():
        return Check(name="toolkit", status="ok", seen="not needed (no container gets a GPU)")
    found = next((p for n in ("nvidia-ctk", "nvidia-container-runtime") if (p := shutil.which(n))), None)
    if found is None:
        return Check(
            name="toolkit", status="failed" if plan.backend == "docker" else "warning",
            seen="NVIDIA's container toolkit is not installed",
            fix="sudo apt-get install nvidia-container-toolkit; sudo nvidia-ctk runtime configure --runtime=docker; "
            "sudo systemctl restart docker. Or run without containers: --backend local.",
        )
    return Check(name="toolkit", status="ok", seen=found)


def check_engine(plan: Plan) -> Check:
    """Reaches the Docker engine, where one is wanted."""
    from sparktune.setup.machine.engine import connect

    if plan.backend == "local" or (plan.backend == "auto" and not nvidia_gpus()):
        return Check(name="engine", status="ok", seen="not needed (stages run on this machine itself)")
    try:
        client = connect()
    except PreflightError as error:
        if plan.backend == "docker":
            raise
        return Check(
            name="engine", status="warning", seen=str(error),
            fix="Stages run on this machine itself until then (--backend local).",
        )
    version = client.version()
    return Check(name="engine", status="ok", seen=f"Docker {version.get('Version', '?')}, {version.get('Arch', '?')}")


def check_page_cache(plan: Plan) -> Check:
    """Looks at the page cache: on a GPU that shares the host's memory, tens of GiB of it slow a run down."""
    memory = meminfo_gib()
    if not memory:
        return Check(name="page cache", status="ok", seen="not readable (no /proc/meminfo)")
    cached, total = memory.get("Cached", 0.0), memory.get("MemTotal", 0.0)
    seen = f"{cached:.1f} of {total:.1f} GiB"
    gpus = nvidia_gpus()
    if gpus and gpus[0][2] is None and cached > _STALE_CACHE_GIB:
        return Check(
            name="page cache", status="warning", seen=seen,
            fix="The GPU shares this memory and CUDA counts it as used. Free it: sync; echo 3 | sudo tee "
            "/proc/sys/vm/drop_caches",
        )
    return Check(name="page cache", status="ok", seen=seen)


def check_clocks(plan: Plan) -> Check:
    """Looks for a GPU that is held back: heat, a hardware slow-down, or low clocks under load."""
    values = query_gpu("clocks.sm", "clocks.max.sm", "temperature.gpu", "utilization.gpu", "pstate")
    if values is None:
        return Check(name="clocks", status="ok", seen="no NVIDIA GPU answers")
    clock, most, heat, load = (float(v) if v.replace(".", "", 1).isdigit() else None for v in values[:4])
    seen = ", ".join([
        f"{clock:.0f} of {most:.0f} MHz" if clock is not None and most is not None else "clocks not readable",
        f"{heat:.0f} °C" if heat is not None else "temperature not readable", f"state {values[4]}",
    ])
    if heat is not None and heat >= _HOT_C:
        return Check(name="clocks", status="warning", seen=seen, fix="The GPU is hot and slows down: clear its vents.")
    if None not in (clock, most, load) and (load or 0) > 50 and (clock or 0) < 0.4 * (most or 1):
        return Check(
            name="clocks", status="warning", seen=f"{seen}, load {load:.0f} %",
            fix="Low clocks under load: a stuck low-power state. Shut down and take the power plug out for a minute.",
        )
    return Check(name="clocks", status="ok", seen=seen)


def hub_answers() -> bool:
    """Returns whether the model hub (or the proxy on the way to it) takes a connection; asked once a process."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    host = urllib.parse.urlsplit(constants.ENDPOINT)
    address = (host.hostname or "", host.port or (443 if host.scheme == "https" else 80))
    if proxy := urllib.request.getproxies().get(host.scheme):
        through = urllib.parse.urlsplit(proxy)
        address = (through.hostname or "", through.port or 80)
    key = f"{address[0]}:{address[1]}"
    if key not in _reached:
        try:
            socket.create_connection(address, timeout=_HUB_S).close()
            _reached[key] = True
        except OSError:
            _reached[key] = False
    return _reached[key]


def check_hub(plan: Plan) -> Check:
    """Tells whether models can be downloaded."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check(name="hub", status="ok", seen="HF_HUB_OFFLINE is set: only what is in the cache is used")
    if hub_answers():
        return Check(name="hub", status="ok", seen=f"{constants.ENDPOINT} answers")
    return Check(
        name="hub", status="warning", seen=f"{constants.ENDPOINT} does not answer",
        fix="Models and tokenizers must be in the cache or a folder. Check the network, or HTTPS_PROXY.",
    )


def check_token(plan: Plan) -> Check:
    """Tells whether there is a hub token and where; never what it is."""
    from huggingface_hub import constants

    if os.environ.get("HF_TOKEN"):
        return Check(name="token", status="ok", seen="in HF_TOKEN")
    path = Path(constants.HF_TOKEN_PATH)
    if not path.is_file():
        return Check(name="token", status="ok", seen="none; gated models need one (hf auth login)")
    if path.stat().st_mode & 0o077:
        return Check(
            name="token", status="warning", seen=f"{path} can be read by other users", fix=f"chmod 600 {path}",
        )
    return Check(name="token", status="ok", seen=f"in {path}")


def check_specs(plan: Plan) -> Check:
    """Looks for a file or folder named specs, which gcc would read while Triton compiles."""
    if (Path.cwd() / "specs").exists():
        return Check(
            name="specs", status="warning", seen=f"{Path.cwd()} holds `specs`",
            fix="Runs and `python train.py` are safe: they compile in a folder of their own. Others that compile here "
            "may fail, for gcc reads `specs` where LIBRARY_PATH has an empty entry.",
        )
    return Check(name="specs", status="ok", seen="no `specs` in the working directory")


def check_shadowed(plan: Plan) -> Check:
    """Looks for files and folders that would pose as packages: in the working directory, PYTHONPATH, and ours."""
    here, root = Path.cwd(), program_root()
    posing = [n for n in _SHADOWING if (here / n).is_dir() or (here / f"{n}.py").is_file()] if here != root else []
    found = importlib.util.find_spec("kernels")
    origins = [*(found.submodule_search_locations or [])] if found else []
    if any(Path(o).resolve() == root / "kernels" for o in origins):
        return Check(
            name="packages", status="warning", seen=f"`import kernels` finds {root / 'kernels'}, not the package",
            fix=f"Take {root} off sys.path (PYTHONPATH, or a .pth file).",
        )
    if path := os.environ.get("PYTHONPATH"):
        return Check(
            name="packages", status="warning", seen=f"PYTHONPATH is set ({path})",
            fix="Stages ignore it; unset it before you call train.py yourself.",
        )
    if posing:
        return Check(
            name="packages", status="warning", seen=f"{here} holds {', '.join(posing)}",
            fix="Runs are safe; a Python started here would import these instead of the packages. Work elsewhere.",
        )
    return Check(name="packages", status="ok", seen=f"nothing shadows the packages of {sys.prefix}")


def check_leftovers(plan: Plan) -> Check:
    """Looks for what earlier runs left: half-written files, and runs that were never finished."""
    patterns = ("*.partial", "*/*.partial", "*/*/*.partial", ".*.sparktune-*")
    partial = [p for root in (plan.results, plan.output) if root.is_dir()
               for pattern in patterns for p in root.glob(pattern)]
    if partial:
        size = sum(p.stat().st_size for p in partial if p.is_file()) / 2**30
        return Check(
            name="leftovers", status="warning",
            seen=f"{len(partial)} half-written files ({size:.1f} GiB), the first is {partial[0]}",
            fix="A running job may still be writing; else a resume clears its own, and the rest can be deleted.",
        )
    unfinished = [p.parent.name for p in sorted(plan.results.glob("*/plan.yaml"))
                  if not p.parent.name.startswith(".") and not (p.parent / "summary.json").is_file()]
    if unfinished:
        shown = ", ".join(unfinished[:5]) + (", ..." if len(unfinished) > 5 else "")
        return Check(
            name="leftovers", status="ok", seen=f"{len(unfinished)} unfinished runs: {shown}",
            fix=f"Go on with one: ./run.sh resume {unfinished[0]}",
        )
    return Check(name="leftovers", status="ok", seen="none")
