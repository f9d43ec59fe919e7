"""Tells the user what training does: one line on standard output, one event in the stage's file."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from sparktune.setup.plan.events import EventKind, EventWriter
from sparktune.setup.plan.untrusted import printable

__all__ = ["Narrator"]

_PROGRESS_EVERY_S = 2.0


class Narrator(EventWriter):
    """An EventWriter that also prints.

    A run's name can follow from its data, so events may come before there is a run folder: they wait in memory until
    `attach` names the file.

    Args:
        speaks: false for a rank other than 0, which does what rank 0 does and says nothing.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.stage = "train"
        self._speaks = speaks
        self._waiting: list[tuple[EventKind, dict[str, Any]]] = []
        self._writer: EventWriter | None = None
        self._log: TextIO | None = None
        self._shown_s = 0.0

    def attach(self, events: Path, log: Path | None) -> None:
        """Sends all events, those waiting included, to `events`; copies printed lines to `log` where given."""
        self._writer = EventWriter(events, self.stage)
        self._log = log.open("a", encoding="utf-8") if log else None
        for kind, fields in self._waiting:
            self._writer.emit(kind, **fields)
            self._show(kind, fields, self._copy)
        self._waiting.clear()

    def line(self, text: str) -> None:
        """Prints a line that is no event, such as a step's figures."""
        if not self._speaks:
            return
        text = printable(text)  # a message may quote the data or a file's name
        try:
            print(text, flush=True)
        except BrokenPipeError:  # whoever read the output is gone; training is not for them alone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._copy(text)

    def emit(self, kind: EventKind, **fields: Any) -> None:
        """Writes one event, and prints the kinds that people read."""
        if not self._speaks:
            return
        if self._writer is None:
            self._waiting.append((kind, fields))
        else:
            self._writer.emit(kind, **fields)
        if not (kind == "message" and fields.get("level") == "error"):  # the caller ends with it on standard error
            self._show(kind, fields, self.line)

    def _show(self, kind: EventKind, fields: dict[str, Any], out: Any) -> None:
        if kind == "message":
            out(fields["text"])
        elif kind == "choice":
            out(f"{fields['what']}: {fields['chosen']} ({fields['reason']})")
        elif kind == "sample":
            out(f"step {fields['step']}: {fields['prompt']!r} -> {fields['answer']!r}")
        elif kind == "progress" and fields["phase"] != "train":
            now = time.monotonic()
            if fields["done"] == fields["total"] or now - self._shown_s >= _PROGRESS_EVERY_S:
                self._shown_s = now
                total = f"/{fields['total']}" if fields["total"] else ""
                out(f"{fields['phase']}: {fields['done']}{total} {fields['unit']}")

    def _copy(self, text: str) -> None:
        if self._log is not None:
            self._log.write(text + "\n")
            self._log.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
        if self._log is not None:
            self._log.close()
