"""A histogram for the terminal: one line a bin, bars by eighths of a character, or # where blocks cannot be drawn."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

__all__ = ["Histogram"]

_ROWS = 12
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDEST = 48


class Histogram:
    """Shows counts over bins; neighbouring bins are joined until there are at most twelve lines.

    Args:
        edges: len(counts) + 1 rising bounds, whole numbers.
        counts: of each bin.
        unit: of the edges.
    """

    def __init__(self, edges: Sequence[int], counts: Sequence[int], unit: str) -> None:
        self._edges, self._counts, self._unit = edges, counts, unit

    def bins(self) -> list[tuple[int, int, int]]:
        """Returns (from, up to, count) of each line; empty bins at both ends are left out."""
        used = [i for i, count in enumerate(self._counts) if count]
        if not used:
            return []
        first, end = used[0], used[-1] + 1
        step = -(-(end - first) // _ROWS)
        starts = range(first, end, step)
        return [
            (self._edges[i], self._edges[min(i + step, end)] - 1, sum(self._counts[i : min(i + step, end)]))
            for i in starts
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the lines, as wide as the terminal allows; a pipe and a terminal without blocks get #."""
        lines = self.bins()
        if not lines:
            return
        places = len(f"{lines[-1][1]:,}")
        digits = len(f"{max(count for _, _, count in lines):,}")
        room = max(8, min(_WIDEST, options.max_width - 2 * places - digits - len(self._unit) - 7))
        blocks = console.is_terminal and not console.no_color and options.encoding.startswith("utf")
        most = max(count for _, _, count in lines)
        for low, high, count in lines:
            bar = _bar(count / most * room, blocks)
            place = f"{low:>{places},} to {high:>{places},} {self._unit} "
            yield Text.assemble(place, (f"{bar:<{room}}", "cyan"), f" {count:>{digits},}")


def _bar(length: float, blocks: bool) -> str:
    """Returns a bar; what is not nothing is always seen."""
    if not blocks:
        return "#" * max(int(length > 0), round(length))
    eighths = max(int(length > 0), round(8 * length))
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
