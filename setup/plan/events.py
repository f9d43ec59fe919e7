"""How a stage tells its parent what it does: one NDJSON file a stage, appended by the stage alone.

The parent (setup/pipeline.py) tails the file and alone writes `state.json` and `events.jsonl`. Standard output is log.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

__all__ = ["EventKind", "EventWriter", "NullEvents"]

EventKind = Literal[
    "start",     # stage, argv-free description
    "progress",  # phase, done, total (or null), unit
    "metric",    # the object that metrics.jsonl gets
    "sample",    # step, prompt, answer
    "message",   # level (info | warning | error), text
    "choice",    # what, chosen, reason: every automatic decision, said once
    "artifact",  # path, bytes
    "end",       # ok, seconds; of training: began_after (a step), spent, first_spent (TrainingLoop)
]


class EventWriter:
    """Appends events to `path`, one JSON object a line, flushed at once so that a parent can tail it.

    Args:
        path: the stage's own file, `RunDir.stage_events(stage)`.
        stage: the stage's name, written into every event.
    """

    def __init__(self, path: Path, stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stage = stage
        self._file = path.open("a", encoding="utf-8")

    def emit(self, kind: EventKind, **fields: Any) -> None:
        """Writes one event. `fields` must be JSON values."""
        event = {"time": round(time.time(), 3), "stage": self.stage, "kind": kind, **fields}
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()

    def progress(self, phase: str, done: int, total: int | None, unit: str) -> None:
        """Reports how far `phase` is."""
        self.emit("progress", phase=phase, done=done, total=total, unit=unit)

    def message(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Reports one sentence to the user."""
        self.emit("message", level=level, text=text)

    def choice(self, what: str, chosen: str, reason: str) -> None:
        """Reports an automatic decision with its reason, once."""
        self.emit("choice", what=what, chosen=chosen, reason=reason)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NullEvents(EventWriter):
    """Takes events and keeps none: for library calls and tests."""

    def __init__(self) -> None:
        self.stage = ""

    def emit(self, kind: EventKind, **fields: Any) -> None:
        """Drops the event."""

    def close(self) -> None:
        """Does nothing."""
