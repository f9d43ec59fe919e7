"""How often a run does something: every so many steps, a tenth of the run where the plan leaves that open."""

from __future__ import annotations

import math

__all__ = ["tenth", "times"]


def tenth(given: int | None, total_steps: int) -> int:
    """Returns an interval in steps: the one given, else a tenth of the run."""
    return given if given is not None else max(1, round(total_steps / 10))


def times(every: int | None, steps: int) -> int:
    """Returns how often a run of `steps` does what it does every so many (see `tenth`), and at its end."""
    return math.ceil(steps / tenth(every, steps))
