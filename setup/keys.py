"""Keys while a stage runs: `s` saves and stops, `a` twice aborts; both are the signals that Ctrl-C sends."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["StopKeys"]

_AGAIN_S = 4.0


class StopKeys:
    """Reads single keys from the terminal without echo, until `close`. Does nothing where no terminal is in front.

    Args:
        on_question: called when `a` was pressed once and wants to be pressed again.
        descriptor: of the terminal; standard input when left out.
    """

    def __init__(self, on_question: Callable[[], None], descriptor: int | None = None) -> None:
        self._on_question = on_question
        self._descriptor = -1
        self._before: list[Any] | None = None
        self._asked_at = 0.0
        self._stopped = False
        try:
            import termios
            import tty

            self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
            # a job in the background would be stopped for touching the terminal
            if os.isatty(self._descriptor) and os.tcgetpgrp(self._descriptor) == os.getpgrp():
                self._before = termios.tcgetattr(self._descriptor)
                tty.setcbreak(self._descriptor)
        except (ImportError, OSError, ValueError):  # ValueError: standard input is no file
            self._before = None

    @property
    def active(self) -> bool:
        """Whether keys are read."""
        return self._before is not None

    def poll(self) -> None:
        """Reads what was pressed since the last call, and sends the signals it means."""
        while self._before is not None and select.select([self._descriptor], [], [], 0)[0]:
            try:
                pressed = os.read(self._descriptor, 64)
            except OSError:  # the terminal was closed; SIGHUP says so in a moment
                return
            if not pressed:
                return
            for key in pressed.decode("utf-8", errors="ignore").lower():
                self._press(key)

    def _press(self, key: str) -> None:
        if key == "s" and not self._stopped:
            self._stopped = True
            os.kill(os.getpid(), signal.SIGINT)
        elif key == "a" and time.monotonic() - self._asked_at <= _AGAIN_S:
            for _ in range(1 if self._stopped else 2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # two signals that arrive together count as one
            self._stopped = True
        elif key == "a":
            self._asked_at = time.monotonic()
            self._on_question()

    def close(self) -> None:
        """Gives the terminal back as it was; a second call does nothing."""
        if self._before is not None:
            import termios

            if os.isatty(self._descriptor):  # unless it was closed meanwhile
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)
            self._before = None
