"""Charts of the report: plain SVG with axes, ticks and hover titles; colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Drawing", "Mark", "Series", "histogram", "line_chart", "nice_ticks", "short_number"]

# One unit is about one CSS pixel on a phone; two columns on a desk enlarge it by a third.
_WIDTH, _HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 22, 40
_MOST_POINTS = 600
_MOST_TARGETS = 150

Points = Sequence[tuple[float, float]]


class Drawing(str):
    """SVG text that this module made: all text in it is escaped, so a template takes it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        """Returns the markup (the protocol of markupsafe and Jinja2)."""
        return str(self)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Points
    """(x, y), sorted by x; values that are not finite are left out."""
    colour: str = "var(--accent)"
    dots: bool = False
    """Draw a dot at every point (few points: evaluations)."""
    smooth: bool = False
    """Draw the points faint and their running mean strong."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A labelled vertical line."""

    x: float
    label: str
    colour: str = "var(--warn)"


@dataclass(kw_only=True)
class _Frame:
    """Maps values to the drawing area."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_x: bool = False
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Returns the horizontal position of a value."""
        low, high = self.x_low, self.x_high
        if self.log_x:
            low, high, value = math.log2(low), math.log2(high), math.log2(max(value, self.x_low))
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Returns the vertical position of a value."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Returns round values (1, 2 or 5 times a power of ten) from at most `low` to at least `high`."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low - pad if low else 0.0), high + pad
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """Returns a number as an axis shows it: 0.002, 2e-4, 1.5k, 12M."""
    size = abs(value)
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.3g}{unit}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, from_zero: bool = False,
    show: Callable[[float], str] = short_number,
) -> Drawing:
    """Returns an `<svg>` with one or more lines over a common x axis, or "" where there is nothing to draw.

    Args:
        series: the lines.
        title: what the chart shows; read by screen readers.
        x_label: below the axis.
        y_label: unit of the y axis.
        from_zero: the y axis starts at zero.
        show: y value -> text, for ticks and hover titles.
    """
    series = [s for s in (_finite(s) for s in series) if s.points]
    if not series:
        return Drawing("")
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    frame = _Frame(x_low=x_low, x_high=x_high, y_low=ticks[0], y_high=ticks[-1])
    _axes(frame, [t for t in nice_ticks(x_low, x_high, 6) if x_low <= t <= x_high], ticks, x_label, y_label, show)
    for one in series:
        _draw_line(frame, one, x_label, show)
    if len(series) > 1:
        _legend(frame, series)
    return _svg(frame, title)


def histogram(
    edges: Sequence[float], counts: Sequence[int], marks: Sequence[Mark], *, title: str, x_label: str
) -> Drawing:
    """Returns an `<svg>` with one bar for each count and labelled vertical lines, or "" for no counts.

    The x axis is logarithmic where the bins grow with the length; equal bins get a linear one.

    Args:
        edges: len(counts) + 1 rising bounds.
        counts: examples in each bin.
        marks: lines, such as the pack length; one beyond the last edge widens the axis.
        title: what the chart shows.
        x_label: below the axis.
    """
    if not counts or not sum(counts) or len(edges) != len(counts) + 1:
        return Drawing("")
    used = [i for i, n in enumerate(counts) if n]
    first, last = used[0], used[-1]
    low, high = float(edges[first]), max([float(edges[last + 1]), *(m.x * 1.04 for m in marks)])
    log_x = last > first and edges[last + 1] - edges[last] >= 4 * (edges[first + 1] - edges[first])
    low = max(low, 1.0) if log_x else low
    ticks = nice_ticks(0, max(counts))
    frame = _Frame(x_low=low, x_high=high, y_low=0, y_high=ticks[-1], log_x=log_x)
    x_ticks = _doubling_ticks(low, high) if log_x else [t for t in nice_ticks(low, high, 6) if low <= t <= high]
    _axes(frame, x_ticks, ticks, x_label, "examples", short_number)
    base = frame.y(0)
    for i in range(first, last + 1):
        left, right, top = frame.x(edges[i]), frame.x(edges[i + 1]), frame.y(counts[i])
        hint = f"{edges[i]:,.0f} to {edges[i + 1]:,.0f} tokens: {counts[i]:,} examples"
        frame.parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 0.8, 0.6):.1f}" '
            f'height="{max(base - top, 0):.1f}"><title>{escape(hint)}</title></rect>'
        )
    for row, mark in enumerate(sorted(marks, key=lambda m: m.x)):
        _draw_mark(frame, mark, row)
    return _svg(frame, title)


def _finite(one: Series) -> Series:
    kept = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
    return Series(name=one.name, points=kept, colour=one.colour, dots=one.dots, smooth=one.smooth)


def _doubling_ticks(low: float, high: float) -> list[float]:
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    every = max(1, math.ceil(len(powers) / 7))
    return [2.0**p for p in powers if p % every == 0]


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str,
    show: Callable[[float], str],
) -> None:
    bottom = _HEIGHT - _BOTTOM
    for tick in y_ticks:
        y = frame.y(tick)
        frame.parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        frame.parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(show(tick))}</text>'
        )
    for tick in x_ticks:
        x = frame.x(tick)
        frame.parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        frame.parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{short_number(tick)}</text>'
        )
    frame.parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    frame.parts.append(
        f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    frame.parts.append(
        f'<text class="label" transform="translate(11 {(_TOP + bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )


def _thin(points: Points, most: int) -> Points:
    """Keeps at most `most` points, the first and the last among them."""
    if len(points) <= most:
        return points
    last = len(points) - 1
    return [points[round(i * last / (most - 1))] for i in range(most)]


def _running_mean(points: Points) -> Points:
    """Mean over the last twentieth of the points (at least five)."""
    window = max(5, len(points) // 20)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    return [
        (x, (sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)) for i, (x, _) in enumerate(points)
    ]


def _path(frame: _Frame, points: Points, colour: str, css: str) -> str:
    steps = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in _thin(points, _MOST_POINTS))
    return f'<polyline class="{css}" style="stroke:{colour}" points="{steps}"/>'


def _draw_line(frame: _Frame, one: Series, x_label: str, show: Callable[[float], str]) -> None:
    smooth = one.smooth and len(one.points) >= 20
    if len(one.points) > 1:
        frame.parts.append(_path(frame, one.points, one.colour, "line faint" if smooth else "line"))
        if smooth:
            frame.parts.append(_path(frame, _running_mean(one.points), one.colour, "line"))
    shown = one.dots or len(one.points) == 1
    for x, y in _thin(one.points, _MOST_TARGETS):
        hint = f"{one.name}, {x_label} {x:g}: {show(y)}"
        css = "dot" if shown else "target"
        frame.parts.append(
            f'<circle class="{css}" style="fill:{one.colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" '
            f'r="{3 if shown else 5}"><title>{escape(hint)}</title></circle>'
        )


def _legend(frame: _Frame, series: Sequence[Series]) -> None:
    x = float(_WIDTH - _RIGHT)
    for one in reversed(series):
        frame.parts.append(
            f'<text class="tick" x="{x:.0f}" y="{_TOP - 9}" text-anchor="end">{escape(one.name)}</text>'
        )
        x -= 6.2 * len(one.name) + 8
        frame.parts.append(f'<rect x="{x - 6:.0f}" y="{_TOP - 17}" width="8" height="8" rx="2" fill="{one.colour}"/>')
        x -= 14


def _draw_mark(frame: _Frame, mark: Mark, row: int) -> None:
    x, top = frame.x(mark.x), _TOP + 6 + 13 * row
    right = x < _WIDTH * 0.6
    frame.parts.append(
        f'<line class="mark" style="stroke:{mark.colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" '
        f'y2="{_HEIGHT - _BOTTOM}"><title>{escape(mark.label)}</title></line>'
        f'<text class="mark-label" style="fill:{mark.colour}" x="{x + (4 if right else -4):.1f}" y="{top}" '
        f'text-anchor="{"start" if right else "end"}">{escape(mark.label)}</text>'
    )


def _svg(frame: _Frame, title: str) -> Drawing:
    return Drawing(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(frame.parts)}</svg>"
    )
