"""The histogram of the terminal: bars that add up, plain where blocks cannot be drawn, as wide as there is room."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from sparktune.setup.histogram import Histogram


def shown(counts, width=80, **settings):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(file=file, width=width, **settings)
    console.print(Histogram(list(range(0, 100 * (len(counts) + 1), 100)), counts, "tokens"))
    file.flush()
    return file.buffer.getvalue().decode()


def test_forty_bins_become_twelve_lines_and_lose_nothing():
    counts = [0, 0, *range(1, 37), 0, 0]
    bins = Histogram(list(range(0, 4100, 100)), counts, "tokens").bins()
    assert len(bins) == 12
    assert sum(count for _, _, count in bins) == sum(counts)
    assert bins[0][0] == 200
    assert bins[-1][1] == 3799
    assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(bins))


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True, "no_color": True}])
def test_a_pipe_and_no_color_get_plain_bars(settings):
    text = shown([1, 1000], **settings)
    assert "0 to  99 tokens #  " in text
    assert text.isascii()
    assert text.rstrip().endswith("1,000")


def test_a_terminal_gets_blocks_and_no_line_is_too_long():
    text = shown([3, 40], force_terminal=True, color_system=None)
    assert "\u2588" in text
    for width in (40, 60, 200):
        assert all(len(line) <= width for line in shown([3, 40_000], width).splitlines())


def test_no_examples_no_lines():
    assert shown([0]) == ""
