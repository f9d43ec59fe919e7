"""What is known of a running stage, gathered from its events: how far, how long still, losses and their trend."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from sparktune.setup import strings
from sparktune.setup.machine.gauges import Gauges
from sparktune.setup.plan.eta import duration

__all__ = ["StageStatus", "amount", "sparkline", "trend"]

_BARS = "▁▂▃▄▅▆▇█"
_KEPT = 240
_FLAT = 0.005
"""A change of the mean below this share counts as none."""
_RECENT = 50


def amount(done: int, total: int | None, unit: str) -> str:
    """Returns "12/30 steps", bytes as GiB or MiB."""
    if unit == "bytes":
        scale, name = (2**30, "GiB") if (total or done) >= 2**30 else (2**20, "MiB")
        left = f"{done / scale:.1f}"
        return f"{left}/{total / scale:.1f} {name}" if total else f"{left} {name}"
    return f"{done:,}/{total:,} {unit}" if total else f"{done:,} {unit}"


def trend(losses: list[float]) -> int:
    """Returns -1 for losses that fall, 1 for rising, 0 for neither: the last tenth (at least two) against before it."""
    count = max(len(losses) // 10, 2)
    if len(losses) < 2 * count:
        return 0
    recent, before = sum(losses[-count:]) / count, sum(losses[-2 * count:-count]) / count
    if abs(recent - before) <= _FLAT * abs(before):
        return 0
    return -1 if recent < before else 1


def sparkline(values: list[float], width: int) -> str:
    """Returns the values as bars, one column each; neighbours are averaged where there are more than `width`."""
    if not values:
        return ""
    group = -(-len(values) // width)
    means = [sum(values[i:i + group]) / len(values[i:i + group]) for i in range(0, len(values), group)]
    low, high = min(means), max(means)
    if high - low < 1e-12:
        return _BARS[0] * len(means)
    return "".join(_BARS[round((m - low) / (high - low) * (len(_BARS) - 1))] for m in means)


class StageStatus:
    """The newest state of one stage.

    Args:
        stage: its name.
        budget_gib: memory that training may use, where it is known.
        clock: seconds; given by tests.
    """

    def __init__(
        self, stage: str, budget_gib: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stage, self.budget_gib = stage, budget_gib
        self._clock = clock
        self.phase, self.unit = "", ""
        self.done = 0
        self.total: int | None = None
        self.losses: deque[float] = deque(maxlen=_KEPT)
        self.figures: dict[str, float] = {}
        """The newest of loss, eval_loss, lr, tok_per_s, peak_gib."""
        self.eval_before: float | None = None
        self.sample: dict[str, Any] | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RECENT)

    def take(self, event: dict[str, Any]) -> None:
        """Takes one event of the stage."""
        kind = event.get("kind")
        if kind == "progress":
            if event["phase"] != self.phase:
                self.phase = event["phase"]
                self._marks.clear()
            self.done, self.total, self.unit = event["done"], event.get("total"), event["unit"]
            self._marks.append((self._clock(), self.done))
        elif kind == "metric":
            for key in ("loss", "eval_loss", "lr", "tok_per_s", "peak_gib"):
                value = event.get(key)
                if isinstance(value, int | float):
                    if key == "eval_loss":
                        self.eval_before = self.figures.get(key)
                    self.figures[key] = value
            if isinstance(event.get("loss"), int | float):
                self.losses.append(event["loss"])
        elif kind == "sample":
            self.sample = event

    def remaining_s(self) -> float | None:
        """Returns the seconds this phase will still take at the pace of its last steps, None before two of them."""
        if self.total is None or len(self._marks) < 2 or self.done >= self.total:
            return None
        (begun, first), (now, last) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        return (self.total - self.done) * (now - begun) / (last - first)

    def progress_words(self) -> str:
        """Returns how far the stage is, and how long it will still take."""
        if not self.unit:
            return ""
        phase = "" if self.phase == self.stage else f"{self.phase} "
        left = self.remaining_s()
        return phase + amount(self.done, self.total, self.unit) + (
            strings.ABOUT_LEFT.format(time=duration(left)) if left is not None else ""
        )

    def loss_words(self) -> str:
        """Returns losses and their trend, in words."""
        parts = []
        if (loss := self.figures.get("loss")) is not None:
            direction = {-1: strings.FALLING, 0: "", 1: strings.RISING}[trend(list(self.losses))]
            parts.append(f"loss {loss:.4f}" + (f" ({direction})" if direction else ""))
        if (evaluation := self.figures.get("eval_loss")) is not None:
            before = "" if self.eval_before is None else f" (was {self.eval_before:.4f})"
            parts.append(f"eval {evaluation:.4f}{before}")
        return ", ".join(parts)

    def speed_words(self) -> str:
        """Returns speed and learning rate."""
        parts = [f"{self.figures['tok_per_s']:,.0f} tok/s"] if "tok_per_s" in self.figures else []
        return ", ".join(parts + ([f"lr {self.figures['lr']:.2e}"] if "lr" in self.figures else []))

    def memory_words(self) -> str:
        """Returns the peak against the budget."""
        peak = self.figures.get("peak_gib")
        if peak is None:
            return ""
        return f"{peak:.2f} of {self.budget_gib:.1f} GiB" if self.budget_gib else f"{peak:.2f} GiB"

    def line(self, gauges: Gauges | None = None) -> str:
        """Returns everything in one line."""
        machine = gauges.words() if gauges is not None and self.stage == "train" else ""
        parts = (self.progress_words(), self.loss_words(), self.speed_words(), self.memory_words(), machine)
        return ", ".join(p for p in parts if p)
