"""Best-fit decreasing: nothing split, nothing lost, budgets kept, little padding, fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktune.setup.data.binpack import pack_examples, padded_length, real_share
from sparktune.setup.demo_corpus import stdlib_rows


def naive(lengths, budget):
    """Best-fit decreasing by looking at every open pack."""
    sums = []
    for size in sorted(lengths, reverse=True):
        fits = [i for i, used in enumerate(sums) if used + size <= budget]
        if fits:
            sums[max(fits, key=lambda i: sums[i])] += size
        else:
            sums.append(size)
    return sorted(sums)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 3000), max_size=60), budget=st.integers(1, 2500), seed=st.integers(0, 2**32 - 1)
)
def test_packs_are_a_partition_within_budget_and_as_good_as_the_naive_rule(lengths, budget, seed):
    packs = pack_examples(lengths, budget, seed)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in pack) for pack in packs]
    for pack, total in zip(packs, sums, strict=True):
        assert total <= budget or len(pack) == 1
        assert [lengths[i] for i in pack] == sorted((lengths[i] for i in pack), reverse=True)
    assert sorted(sums) == naive(lengths, budget)
    assert packs == pack_examples(lengths, budget, seed)


def test_the_seed_breaks_ties_only():
    lengths = [5] * 40 + [3] * 40
    one, other = pack_examples(lengths, 16, 1), pack_examples(lengths, 16, 2)
    assert one != other
    assert len(one) == len(other)


def test_two_hundred_thousand_examples_pack_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 16384, 200_000)
    started = time.process_time()
    for budget in (5376, 262_144):
        pack_examples(lengths, budget)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.1])
def test_real_share_of_a_long_tail(sigma):
    lengths = np.random.default_rng(1).lognormal(np.log(3000) - sigma**2 / 2, sigma, 5000).clip(16, 16384)
    assert real_share(lengths.astype(np.int64), 5376) >= 0.85


def test_real_share_of_the_standard_librarys_docstrings():
    # Characters over four stand for tokens: the shape of the tail is what matters here.
    lengths = [sum(len(m["content"]) for m in row["messages"]) // 4 + 10 for row in stdlib_rows()]
    for pack_length in (512, 1024, 2048, 5376):
        assert real_share(lengths, pack_length) >= 0.85


def test_padding_rule():
    assert [padded_length(n, 1000) for n in (1, 1000, 1001, 1024, 1025)] == [1000, 1000, 1024, 1024, 1152]
    assert real_share([], 128) == 0.0
    assert real_share([64, 64, 200], 128) == pytest.approx(328 / (128 + 256))


@pytest.mark.parametrize(("lengths", "budget", "says"), [
    ([1, 0], 4, "example 1"), ([1], 0, "budget"), ([[1]], 4, "one-dimensional"),
])
def test_bad_arguments_are_named(lengths, budget, says):
    with pytest.raises(ValueError, match=says):
        pack_examples(lengths, budget)
