"""Stopping on request: the first SIGINT or SIGTERM asks for a checkpoint and an end, the second aborts."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """Knows whether the user asked to stop.

    Before the loop runs there is nothing to save, so the first signal ends the process at once; while it runs, the
    step in progress is finished first, because half a step cannot be resumed exactly.
    """

    def __init__(self) -> None:
        self.requested = False
        """A signal has come; the loop stops after the step in progress."""
        self.urgent = False
        """The stop cannot wait for the end of the step: it is given up and done again when the run goes on."""
        self.why = "as you asked"
        """The end of the sentence that says so."""
        self.aborted = False
        """A second signal has come."""
        self.looping = False
        """The loop runs and looks at `requested` itself."""
        self.deaf = False
        """The end is agreed on and written; nothing is left to ask for."""

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM. Main thread only."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.deaf:
            return
        # KeyboardInterrupt, because nothing that handles errors of rows or files may take it for one of those.
        self.aborted = self.requested
        self.requested = True
        if self.aborted or not self.looping:
            raise KeyboardInterrupt(signal.Signals(number).name)
