"""The console that everything for people goes through: what is no character to print never reaches the terminal.

A row of the data, a model's answer, a run's name or a file's path may hold escape codes; a terminal would obey them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from sparktune.setup.plan.untrusted import printable

__all__ = ["Terminal", "json_text"]


class Terminal(Console):
    """A rich Console that shows control characters by their number; colours and cursor movements are rich's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the segments of `renderable`, each fit for a screen."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def json_text(value: Any) -> str:
    """Returns `value` as JSON that people may look at: what is no character to print stands there as its escape."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
