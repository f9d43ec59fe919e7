"""What the machine feels like while it works: the GPU's temperature, clocks and load, and the host's free memory.

nvidia-smi is asked, not NVML: it is there wherever a driver is, and a figure it cannot give reads [N/A].
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GaugeReader", "Gauges", "ask_nvidia_smi", "meminfo_gib", "query_gpu", "read_gauges"]

_QUERY_S = 20.0
_FIELDS = {
    "temperature_c": "temperature.gpu", "clock_mhz": "clocks.sm", "max_clock_mhz": "clocks.max.sm",
    "load_percent": "utilization.gpu", "power_w": "power.draw",
}


@dataclass(frozen=True, kw_only=True)
class Gauges:
    """One reading; what cannot be read is None and named in `absent`."""

    temperature_c: float | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    load_percent: float | None = None
    power_w: float | None = None
    available_gib: float | None = None
    """Memory of the host that a new process may use."""
    absent: str = ""
    """Which figures are missing, and why; empty where all are there."""

    def words(self) -> str:
        """Returns the figures in one line."""
        parts = [f"{self.temperature_c:.0f} °C"] if self.temperature_c is not None else []
        parts += [f"{self.clock_mhz:,.0f} MHz"] if self.clock_mhz is not None else []
        parts += [f"load {self.load_percent:.0f} %"] if self.load_percent is not None else []
        parts += [f"{self.power_w:.0f} W"] if self.power_w is not None else []
        return ", ".join([*parts, *([self.absent] if self.absent else [])])


def meminfo_gib() -> dict[str, float]:
    """Returns /proc/meminfo's figures in GiB (MemTotal, MemAvailable, Cached ...); empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) / 2**20 for name, _, rest in (line.partition(":") for line in lines) if rest}


def _visible_gpus() -> list[str] | None:
    """Returns the GPUs that CUDA_VISIBLE_DEVICES names, as nvidia-smi takes them; None where it leaves all of them."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES")
    if words is None:
        return None
    named = []
    for word in (word.strip() for word in words.split(",")):
        if word.startswith("MIG-"):
            return None  # a slice of a GPU, which nvidia-smi does not take as --id
        if not (word.isdigit() or word.startswith("GPU-")):
            break  # CUDA stops at the first that it cannot read: nothing, or -1
        named.append(word)
    return named


def ask_nvidia_smi(*fields: str) -> list[str]:
    """Returns nvidia-smi's answers, one line for each GPU that CUDA would show this process.

    Empty where it is absent, fails or hangs, and where CUDA_VISIBLE_DEVICES hides every GPU. A number in that variable
    is taken as nvidia-smi counts; CUDA counts so on machines whose GPUs are alike.
    """
    visible = _visible_gpus()
    if shutil.which("nvidia-smi") is None or visible == []:
        return []
    argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    argv += [f"--id={','.join(visible)}"] if visible else []
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, timeout=_QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def query_gpu(*fields: str) -> list[str] | None:
    """Returns nvidia-smi's answers for the first GPU of this process, as texts; None where there are none."""
    lines = ask_nvidia_smi(*fields)
    values = [part.strip() for part in lines[0].split(",")] if lines else []
    return values if len(values) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # [N/A], [Not Supported]


def read_gauges() -> Gauges:
    """Returns what can be read now."""
    available = meminfo_gib().get("MemAvailable")
    values = query_gpu(*_FIELDS.values())
    if values is None:
        return Gauges(available_gib=available, absent="temperature and clocks: no nvidia-smi answers")
    figures = {name: _number(value) for name, value in zip(_FIELDS, values, strict=True)}
    missing = [name.rpartition("_")[0].replace("_", " ") for name, value in figures.items() if value is None]
    absent = f"not readable here: {', '.join(missing)}" if missing else ""
    return Gauges(**figures, available_gib=available, absent=absent)


class GaugeReader:
    """Reads the gauges every few seconds on a thread of its own, so that a slow driver never holds up the display.

    Args:
        every_s: seconds between two readings.
    """

    def __init__(self, every_s: float = 3.0) -> None:
        self.latest: Gauges | None = None
        """The newest reading; None before the first."""
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            self.latest = read_gauges()
            self._stop.wait(max(self._every_s - (time.monotonic() - begun), 0.5))

    def close(self) -> None:
        """Stops reading; a reading under way is left to end by itself."""
        self._stop.set()
