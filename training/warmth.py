"""Whether a process paid for what the machine keeps: kernels compiled into caches, files read into the page cache.

A rehearsal is a process of its own below `train.py --rehearse`. One that found the machine cold says so by its exit
code and is started once more, so that what it times is what a run will find.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sparktune.setup.plan.eta import Calibration
from sparktune.setup.plan.outfolder import write_durably

__all__ = ["ATTEMPT", "COLD", "Warmth", "run_until_warm"]

ATTEMPT = "--attempt"
"""Flag by which `run_until_warm` tells the process that it is the one to rehearse, and for which time."""
COLD = 76
"""Exit code of a process that paid for what the next will find."""
_MUCH_BYTES = 64 * 2**20


def run_until_warm(command: Sequence[str], result: Path) -> int:
    """Runs a rehearsal, and once more if the machine was cold. Returns its exit code.

    What the process takes to end, once it has written its result, a run takes too: it is added here, where it is seen.

    Args:
        command: the rehearsal's, without `--attempt`.
        result: the calibration.json that it writes.
    """
    code = COLD
    for attempt in ("1", "2"):
        if code != COLD:
            break
        process = subprocess.Popen([*command, ATTEMPT, attempt])

        def pass_on(number: int, frame: FrameType | None, to: subprocess.Popen[bytes] = process) -> None:
            to.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code == 0:
        _add_end(result, max(0.0, time.time() - result.stat().st_mtime))
    return code if code >= 0 else 128 - code


def _add_end(result: Path, seconds: float) -> None:
    found = Calibration.model_validate_json(result.read_bytes())
    whole = {name: round(getattr(found, name) + seconds, 2) for name in ("train_s", "low_s", "high_s")}
    parts = {**found.parts, "end": round(seconds, 2)}
    write_durably(result, found.model_copy(update={**whole, "parts": parts}).model_dump_json(indent=1))


def _compiled() -> int:
    """Files in the caches of Triton's and inductor's compilers."""
    roots = [Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")]
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    roots += [Path(own)] if own else Path(tempfile.gettempdir()).glob("torchinductor_*")  # inductor's own rule
    return sum(len(files) for root in roots for _, _, files in os.walk(root))


def _read_bytes() -> int:
    """Bytes that storage had to deliver to this process so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def _age_s() -> float:
    """Seconds since this process began; elsewhere than on Linux what it computed so far stands for them."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, since the boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.process_time()


class Warmth:
    """What the machine kept when this process began.

    Args:
        attempt: 1 or 2. What is cold at the second is cold for a run too.
    """

    def __init__(self, attempt: int) -> None:
        self._started, self._attempt = time.monotonic() - _age_s(), attempt
        self._compiled = _compiled()
        self.why = ""

    def since_start_s(self) -> float:
        """Returns the seconds since the process began."""
        return time.monotonic() - self._started

    def is_cold(self) -> bool:
        """Returns whether this process compiled, or read much from the disk, and another one may follow."""
        made, read = _compiled() - self._compiled, _read_bytes()
        if made > 0:
            self.why = f"{made} compiled files are new"
        elif read > _MUCH_BYTES:
            self.why = f"{read / 1e6:,.0f} MB came from the disk"
        return bool(self.why) and self._attempt == 1
