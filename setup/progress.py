"""What a running stage looks like: bars on a terminal, one plain line every few seconds everywhere else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparktune.setup import strings

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "amount", "make_display"]

_PLAIN_EVERY_S = 5.0
_LEVEL_STYLE = {"info": "", "warning": "yellow", "error": "bold red"}


def amount(done: int, total: int | None, unit: str) -> str:
    """Returns "12/30 steps", bytes as GiB or MiB."""
    if unit == "bytes":
        scale, name = (2**30, "GiB") if (total or done) >= 2**30 else (2**20, "MiB")
        left = f"{done / scale:.1f}"
        return f"{left}/{total / scale:.1f} {name}" if total else f"{left} {name}"
    return f"{done}/{total} {unit}" if total else f"{done} {unit}"


def _metric(event: dict[str, Any]) -> str:
    """Returns the figures of a training step that fit into one line."""
    parts = []
    for key, form in (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("tok_per_s", "{:.0f} tok/s"),
                      ("peak_gib", "{:.2f} GiB")):
        value = event.get(key)
        if isinstance(value, int | float):
            parts.append(form.format(value))
    return ", ".join(parts)


class Display(Protocol):
    """Shows stages and their events to a person; everything goes to standard error."""

    console: Console

    def begin(self, stage: str, number: int, count: int) -> None:
        """A stage starts."""

    def event(self, event: dict[str, Any]) -> None:
        """The running stage reported something."""

    def end(self, stage: str, seconds: float, code: int) -> None:
        """The stage ended with `code`."""

    def say(self, text: str, level: str = "info") -> None:
        """One sentence for the user."""


class _Common:
    """What both displays share: messages, choices and samples are lines of text."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str, level: str = "info") -> None:
        """Prints a sentence."""
        self.console.print(escape(text), style=_LEVEL_STYLE.get(level, ""), highlight=False, soft_wrap=True)

    def _line_event(self, event: dict[str, Any]) -> bool:
        kind = event.get("kind")
        if kind == "message":
            self.say("  " + str(event.get("text", "")), str(event.get("level", "info")))
        elif kind == "choice":
            self.say("  " + strings.CHOICE.format(**{k: event.get(k, "") for k in ("what", "chosen", "reason")}))
        elif kind == "sample":
            self.say("  " + strings.sample_line(event))
        else:
            return False
        return True


class PlainDisplay(_Common):
    """No cursor movement: a line when a stage starts and ends, and one every few seconds between.

    Args:
        console: of standard error.
        clock: seconds; given by tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self._clock = clock
        self._stage = ""
        self._shown = 0.0
        self._progress = ""
        self._figures = ""

    def begin(self, stage: str, number: int, count: int) -> None:
        """Prints the stage's title."""
        self._stage, self._shown, self._progress, self._figures = stage, self._clock(), "", ""
        self.say(f"[{number}/{count}] {strings.STAGES[stage]}")

    def event(self, event: dict[str, Any]) -> None:
        """Keeps the newest state and prints it when the last line is old enough."""
        if self._line_event(event):
            return
        if event.get("kind") == "progress":
            phase = "" if event["phase"] == self._stage else f"{event['phase']} "
            self._progress = phase + amount(event["done"], event.get("total"), event["unit"])
        elif event.get("kind") == "metric":
            self._figures = _metric(event) or self._figures  # an evaluation's row has no figures of a step
        now = self._clock()
        if now - self._shown >= _PLAIN_EVERY_S and (self._progress or self._figures):
            self._shown = now
            self.say(f"  {self._stage}: " + ", ".join(p for p in (self._progress, self._figures) if p))

    def end(self, stage: str, seconds: float, code: int) -> None:
        """Prints how the stage ended."""
        last = f", {self._figures}" if self._figures and code == 0 else ""
        self.say(f"  {stage}: {strings.stage_end(code)} in {seconds:.1f} s{last}")


class LiveDisplay(_Common):
    """A progress bar for the running stage, with elapsed and remaining time; finished stages stay as lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._stage = self._phase = self._figures = self._head = ""

    def begin(self, stage: str, number: int, count: int) -> None:
        """Starts the stage's bar."""
        self._stage, self._phase, self._figures = stage, "", ""
        self._head = f"[{number}/{count}] {strings.STAGES[stage]}"
        self._bars = Progress(
            SpinnerColumn("line"), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False), console=self.console, transient=True,
        )
        self._task = self._bars.add_task(self._head, total=None, amount="", figures="")
        self._bars.start()

    def event(self, event: dict[str, Any]) -> None:
        """Moves the bar, or prints a line above it."""
        if self._line_event(event) or self._bars is None or self._task is None:
            return
        if event.get("kind") == "metric":
            self._figures = _metric(event) or self._figures  # an evaluation's row has no figures of a step
            self._bars.update(self._task, figures=self._figures)
        elif event.get("kind") == "progress":
            if event["phase"] != self._phase:
                self._phase = event["phase"]
                head = self._head if self._phase == self._stage else f"{self._head}: {self._phase}"
                self._bars.reset(self._task, total=event.get("total"), description=head)
            self._bars.update(
                self._task, completed=event["done"], total=event.get("total"),
                amount=amount(event["done"], event.get("total"), event["unit"]), figures=self._figures,
            )

    def end(self, stage: str, seconds: float, code: int) -> None:
        """Replaces the bar by a line."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None
        last = f", {self._figures}" if self._figures and code == 0 else ""
        style = "green" if code == 0 else "yellow" if code in (75, 130) else "bold red"
        self.console.print(
            escape(f"{self._head}: {strings.stage_end(code)} in {seconds:.1f} s{last}"), style=style, highlight=False
        )


def make_display(console: Console, plain: bool) -> Display:
    """Returns bars where `console` is a capable terminal and `plain` was not asked for, else plain lines."""
    if plain or not console.is_terminal or console.is_dumb_terminal or os.environ.get("CI"):
        return PlainDisplay(console)
    return LiveDisplay(console)
