"""Shows an image build: which step of how many, elapsed and remaining time, the last line it wrote."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

__all__ = ["BuildDisplay", "build_line"]

_PLAIN_EVERY_S = 10.0
_MIB = 2**20


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def build_line(event: dict[str, Any]) -> str:
    """Returns a progress event of a build or a pull as one line."""
    done, total = event["done"], event.get("total")
    if event["unit"] == "bytes":
        amount = f"{done / _MIB:,.0f} of {total / _MIB:,.0f} MiB" if total else f"{done / _MIB:,.0f} MiB"
    else:
        amount = f"step {min(done + 1, total)} of {total}"
    parts = [f"image: {amount}", " ".join(str(event["phase"]).split())[:80]]
    if "elapsed_s" in event:
        remaining = event.get("remaining_s")
        left = f", about {_clock(remaining)} left" if remaining is not None else ""
        parts.append(f"{_clock(event['elapsed_s'])}{left}")
    if event.get("last"):
        parts.append(str(event["last"])[:80])
    return " | ".join(parts)


class BuildDisplay:
    """A line that changes in place on a terminal; elsewhere one every ten seconds. A context manager."""

    def __init__(self, console: Console, plain: bool) -> None:
        self._console = console
        self._live = not plain and console.is_terminal and not console.is_dumb_terminal
        self._status: Status | None = None
        self._shown = time.monotonic()

    def event(self, event: dict[str, Any]) -> None:
        """Takes one event of `ensure_image`."""
        kind = event.get("kind")
        if kind == "message":
            style = "yellow" if event.get("level") == "warning" else ""
            self._console.print(escape("  " + str(event["text"])), style=style, highlight=False, soft_wrap=True)
        elif kind == "choice":
            text = f"  {event['what']}: {event['chosen']} ({event['reason']})"
            self._console.print(escape(text), highlight=False, soft_wrap=True)
        elif kind == "progress" and self._live:
            text = escape(build_line(event))
            if self._status is None:
                self._status = self._console.status(text)
                self._status.start()
            self._status.update(text)
        elif kind == "progress" and time.monotonic() - self._shown >= _PLAIN_EVERY_S:
            self._shown = time.monotonic()
            self._console.print(escape("  " + build_line(event)), highlight=False, soft_wrap=True)

    def __enter__(self) -> BuildDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
