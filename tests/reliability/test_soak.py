"""A short soak, and what its line calls flat."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sparktune.lab.soak import soak, trend


def test_growth_is_told_from_noise() -> None:
    chance = random.Random(3)
    noise = [500 + chance.gauss(0, 3) for _ in range(1000)]
    flat = trend("memory", "MiB", noise, steps_a_figure=20)
    assert flat.flat
    assert abs(flat.slope) < 3 * flat.error
    leaking = trend("memory", "MiB", [v + i * 0.02 for i, v in enumerate(noise)], steps_a_figure=20)
    assert not leaking.flat  # 20 MiB over the run
    assert leaking.slope == pytest.approx(1.0, abs=0.1)  # MiB a thousand steps
    assert "NOT FLAT" in leaking.line()
    handles = trend("open files", "handles", [30.0 + i // 200 for i in range(1000)], steps_a_figure=20)
    assert not handles.flat
    assert trend("open files", "handles", [30.0] * 1000, steps_a_figure=20).flat


def test_too_short_a_soak_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give 400 or more"):
        soak(tmp_path, 100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_steps_are_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for found in soak(tmp_path, 2000):
        assert found.flat or found.name == "step time", found.line()  # the machine's other work is in the time
