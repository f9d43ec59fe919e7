"""A thread that watches the host's free memory and stops the run while there is still enough to write a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType

from sparktune.training.stop import StopRequest

__all__ = ["PERIOD_S", "MemoryWatchdog"]

PERIOD_S = 0.2
"""Between two looks: a GB10 was seen to lose 21 GiB in 1.5 s."""


class MemoryWatchdog:
    """Asks for a stop as soon as less than `floor_gib` is free. A context manager.

    The stop reaches the loop as SIGTERM does, with a reason: it gives up the step in progress, writes a checkpoint of
    the last one and leaves with exit code 75. Before the loop there is nothing to keep, and the process ends.

    Args:
        stop: what the loop looks at; its handlers are installed.
        floor_gib: least free memory.
        available_gib: tells the free memory.
    """

    def __init__(self, stop: StopRequest, floor_gib: float, available_gib: Callable[[], float]) -> None:
        self._stop, self._floor_gib, self._available_gib = stop, floor_gib, available_gib
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watchdog", daemon=True)
        self.looks = 0
        """How often it has looked."""

    def _watch(self) -> None:
        while not self._over.wait(PERIOD_S):
            self.looks += 1
            free = self._available_gib()
            if free >= self._floor_gib:
                continue
            self._stop.urgent = True  # also where a stop was asked for already
            if not self._stop.requested:
                self._stop.why = (
                    f"because only {free:.2f} GiB of memory is free and the system needs {self._floor_gib:.2f}; close "
                    "other programs, lower --pack-length or pass --recompute layer"
                )
                os.kill(os.getpid(), signal.SIGTERM)
            return

    def __enter__(self) -> MemoryWatchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self._over.set()
        self._thread.join()
