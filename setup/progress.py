"""What a running stage looks like: a live view on a terminal, one plain line every few seconds everywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparktune.setup import strings
from sparktune.setup.keys import StopKeys
from sparktune.setup.machine.gauges import GaugeReader, Gauges, read_gauges
from sparktune.setup.plan.eta import duration
from sparktune.setup.status import StageStatus, amount, sparkline, trend

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "amount", "make_display"]

_PLAIN_EVERY_S = 5.0
_LEVEL_STYLE = {"info": "", "warning": "yellow", "error": "bold red"}
_ARROW = {-1: ("↓", "green"), 0: ("→", "dim"), 1: ("↑", "yellow")}
_SPARK = 32
_TIGHT = 0.92
"""Share of the budget above which memory is shown as a warning."""


class Display(Protocol):
    """Shows stages and their events to a person; everything goes to standard error."""

    console: Console
    budget_gib: float | None
    """Memory that training may use; set once it is known."""

    def begin(self, stage: str, number: int, count: int) -> None:
        """A stage starts."""

    def event(self, event: dict[str, Any]) -> None:
        """The running stage reported something."""

    def tick(self) -> None:
        """Called several times a second while a stage runs."""

    def end(self, stage: str, seconds: float, code: int) -> None:
        """The stage ended with `code`."""

    def say(self, text: str, level: str = "info") -> None:
        """One sentence for the user."""


class _Common:
    """What both displays share: messages and choices are lines of text."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.budget_gib: float | None = None

    def say(self, text: str, level: str = "info") -> None:
        """Prints a sentence."""
        self.console.print(escape(text), style=_LEVEL_STYLE.get(level, ""), highlight=False, soft_wrap=True)

    def _line_event(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "message":
            self.say("  " + str(event.get("text", "")), str(event.get("level", "info")))
        elif kind == "choice":
            self.say("  " + strings.CHOICE.format(**{k: event.get(k, "") for k in ("what", "chosen", "reason")}))


def _last_figures(status: StageStatus | None) -> str:
    parts = (status.loss_words(), status.speed_words(), status.memory_words()) if status else ()
    return ", ".join(p for p in parts if p)


class PlainDisplay(_Common):
    """No cursor movement: a line when a stage starts and ends, and one every few seconds between.

    Args:
        console: of standard error.
        clock: seconds; given by tests.
        gauges: reads temperature and clocks, once a line.
    """

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic,
        gauges: Callable[[], Gauges] = read_gauges,
    ) -> None:
        super().__init__(console)
        self._clock, self._gauges = clock, gauges
        self._status: StageStatus | None = None
        self._shown = 0.0

    def begin(self, stage: str, number: int, count: int) -> None:
        """Prints the stage's title."""
        self._status, self._shown = StageStatus(stage, self.budget_gib, self._clock), self._clock()
        self.say(f"[{number}/{count}] {strings.STAGES[stage]}")

    def event(self, event: dict[str, Any]) -> None:
        """Keeps the newest state and prints it when the last line is old enough."""
        self._line_event(event)
        if event.get("kind") == "sample":
            self.say("  " + strings.sample_line(event))
        if self._status is None:
            return
        self._status.take(event)
        now = self._clock()
        if event.get("kind") in ("progress", "metric") and now - self._shown >= _PLAIN_EVERY_S:
            line = self._status.line(self._gauges() if self._status.stage == "train" else None)
            if line:
                self._shown = now
                self.say(f"  {self._status.stage}: {line}")

    def tick(self) -> None:
        """Nothing: lines follow from events."""

    def end(self, stage: str, seconds: float, code: int) -> None:
        """Prints how the stage ended."""
        last = _last_figures(self._status) if code == 0 else ""
        self.say(f"  {stage}: {strings.stage_end(code)} in {seconds:.1f} s" + (f", {last}" if last else ""))
        self._status = None


class LiveDisplay(_Common):
    """A few lines that change in place while a stage runs; finished stages stay as lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live: Live | None = None
        self._status: StageStatus | None = None
        self._gauges: GaugeReader | None = None
        self._keys: StopKeys | None = None
        self._head = ""
        self._begun = 0.0

    def begin(self, stage: str, number: int, count: int) -> None:
        """Starts the stage's view."""
        self._status, self._begun = StageStatus(stage, self.budget_gib), time.monotonic()
        self._head = f"[{number}/{count}] {strings.STAGES[stage]}"
        self._gauges = GaugeReader() if stage == "train" else None
        self._keys = StopKeys(lambda: self.say(strings.ABORT_AGAIN, "warning")) if sys.stdin else None
        self._live = Live(
            get_renderable=self._render, console=self.console, transient=True, refresh_per_second=4,
            redirect_stdout=False, redirect_stderr=False,
        )
        self._live.start()

    def event(self, event: dict[str, Any]) -> None:
        """Takes an event; sentences are printed above the view."""
        self._line_event(event)
        if self._status is not None:
            self._status.take(event)
            if event.get("kind") == "sample" and self._status.stage != "train":
                self.say("  " + strings.sample_line(event))

    def tick(self) -> None:
        """Reads the keys."""
        if self._keys is not None:
            self._keys.poll()

    def end(self, stage: str, seconds: float, code: int) -> None:
        """Replaces the view by a line."""
        if self._keys is not None:
            self._keys.close()
        if self._gauges is not None:
            self._gauges.close()
        if self._live is not None:
            self._live.stop()
        last = _last_figures(self._status) if code == 0 else ""
        self._live = self._status = self._gauges = self._keys = None
        style = "green" if code == 0 else "yellow" if code in (75, 130) else "bold red"
        text = f"{self._head}: {strings.stage_end(code)} in {seconds:.1f} s" + (f", {last}" if last else "")
        self.console.print(escape(text), style=style, highlight=False)

    # -- the view

    def _render(self) -> RenderableType:
        status = self._status
        if status is None:
            return Text()
        elapsed = time.monotonic() - self._begun
        head = Text.assemble((self._head, "bold"), f"  {duration(elapsed)}")
        if status.phase and status.phase != status.stage:
            head.append(f"  {status.phase}", "dim")
        parts: list[RenderableType] = [head, self._bar(status, elapsed)]
        if status.stage == "train":
            parts.append(self._figures(status))
        if self._keys is not None and self._keys.active:
            parts.append(Text(strings.KEYS_TRAIN if status.stage == "train" else strings.KEYS_STAGE, "dim"))
        return Group(*parts)

    def _bar(self, status: StageStatus, elapsed: float) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(
            total=status.total, completed=status.done, width=min(40, max(self.console.width - 44, 10)),
            pulse=status.total is None, animation_time=elapsed, complete_style="cyan", finished_style="green",
            pulse_style="cyan",
        )
        left = status.remaining_s()
        words = amount(status.done, status.total, status.unit) if status.unit else ""
        line.add_row(bar, Text(words + (strings.ABOUT_LEFT.format(time=duration(left)) if left is not None else "")))
        return line

    def _figures(self, status: StageStatus) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        if "loss" in status.figures:
            arrow, style = _ARROW[trend(list(status.losses))]
            width = min(_SPARK, max(self.console.width - 60, 8))
            table.add_row("loss", Text.assemble(
                f"{status.figures['loss']:.4f} ", (arrow, style), " ",
                (sparkline(list(status.losses), width), "cyan"), f"  {self._evaluation(status)}",
            ))
        if speed := status.speed_words():
            table.add_row("speed", speed)
        if memory := status.memory_words():
            peak, budget = status.figures["peak_gib"], status.budget_gib
            table.add_row("memory", Text(memory, "yellow" if budget and peak > _TIGHT * budget else ""))
        if self._gauges is not None and self._gauges.latest is not None:
            table.add_row("machine", self._gauges.latest.words())
        if status.sample is not None:
            shown = "".join(c if c.isprintable() else " " for c in strings.sample_line(status.sample))
            table.add_row("sample", Text(shown))
        return table

    @staticmethod
    def _evaluation(status: StageStatus) -> str:
        value = status.figures.get("eval_loss")
        if value is None:
            return ""
        return f"eval {value:.4f}" + ("" if status.eval_before is None else f" (was {status.eval_before:.4f})")


def make_display(console: Console, plain: bool) -> Display:
    """Returns the live view where `console` is a capable terminal and `plain` was not asked for, else plain lines."""
    if plain or not console.is_terminal or console.is_dumb_terminal or os.environ.get("CI"):
        return PlainDisplay(console)
    return LiveDisplay(console)
