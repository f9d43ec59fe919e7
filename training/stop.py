"""Stopping on request: the first SIGINT or SIGTERM asks for a checkpoint and an end, the second aborts."""

from __future__ import annotations

import signal
from types import FrameType

from sparktune.setup.plan.errors import StoppedResumable

__all__ = ["StopRequest"]


class StopRequest:
    """Knows whether the user asked to stop.

    Before the loop runs there is nothing to save, so the first signal ends the process at once; while it runs, the
    step in progress is finished first, because half a step cannot be resumed exactly.
    """

    def __init__(self) -> None:
        self.requested = False
        """A signal has come; the loop stops after the step in progress."""
        self.looping = False
        """The loop runs and looks at `requested` itself."""

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM. Main thread only."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            raise KeyboardInterrupt(f"second signal ({name})")
        self.requested = True
        if not self.looping:
            raise StoppedResumable(f"Stopped by {name} before the first step; nothing was trained yet. Start it again.")
