"""Run length and learning rate are pure functions of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktune.setup.plan.intervals import tenth, times
from sparktune.training.schedule import learning_rate, run_length, warmup_length


def rates(shape: str, total: int, warmup: int) -> list[float]:
    return [learning_rate(s, peak=2.0, total_steps=total, warmup=warmup, shape=shape) for s in range(1, total + 1)]


def test_linear_rises_to_the_peak_and_falls_to_just_above_zero() -> None:
    assert rates("linear", 6, 2) == [1.0, 2.0, 2.0 * 4 / 5, 2.0 * 3 / 5, 2.0 * 2 / 5, pytest.approx(2.0 * 1 / 5)]


def test_cosine_is_half_a_cosine_after_warm_up() -> None:
    expected = [2.0 / 3, 4.0 / 3, 2.0, *(1.0 + math.cos(math.pi * k / 5) for k in range(1, 5))]
    assert rates("cosine", 7, 3) == pytest.approx(expected, rel=1e-15)


def test_constant_stays() -> None:
    assert rates("constant", 4, 1) == [2.0] * 4
    assert rates("constant", 3, 0) == [2.0] * 3


@given(st.integers(1, 500), st.floats(0, 0.99), st.sampled_from(["cosine", "linear", "constant"]))
def test_every_step_learns_and_none_exceeds_the_peak(total: int, ratio: float, shape: str) -> None:
    warmup = warmup_length(total, ratio, None)
    seen = rates(shape, total, warmup)
    assert all(0.0 < lr <= 2.0 for lr in seen)
    assert seen[:warmup] == sorted(seen[:warmup])
    assert seen[warmup:] == sorted(seen[warmup:], reverse=True)


def test_warm_up_takes_at_least_one_step_unless_it_is_off() -> None:
    assert warmup_length(10, 0.03, None) == 1
    assert warmup_length(200, 0.03, None) == 6
    assert warmup_length(200, 0.0, None) == 0
    assert warmup_length(200, 0.03, 0) == 0
    assert warmup_length(5, 0.03, 50) == 5


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4))
def test_an_epoch_serves_everything_once_and_no_step_crosses_its_end(n: int, accumulate: int, epochs: int) -> None:
    length = run_length(n, accumulate, epochs, None)
    served: list[tuple[int, int]] = []
    for step in range(1, length.total_steps + 1):
        epoch, first, last = length.where(step)
        assert 0 < last - first <= accumulate
        served += [(epoch, index) for index in range(first, last)]
        assert length.position_after(step) == len(served)
    assert served == [(e, i) for e in range(epochs) for i in range(n)]
    assert length.epoch_after(length.total_steps) == epochs


def test_parts_of_epochs_and_max_steps() -> None:
    assert run_length(10, 4, 0.5, None).total_steps == 2
    assert run_length(10, 4, 1e-9, None).total_steps == 1
    assert run_length(10, 4, 3.0, 7).total_steps == 7
    assert run_length(10, 4, 1.0, 7).where(7) == (2, 0, 4)
    with pytest.raises(ValueError, match="no training examples"):
        run_length(0, 4, 1.0, None)


def test_a_tenth_of_the_run_unless_given() -> None:
    assert [tenth(None, 5), tenth(None, 200), tenth(7, 200)] == [1, 20, 7]
    assert [times(None, 5), times(None, 200), times(7, 200), times(None, 19)] == [5, 10, 29, 10]
