"""How a step's packs are dealt to ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.trainable import refuse_ranks
from sparktune.training.dealing import DealtPacks, StepCost, deal
from sparktune.training.packing import PackPlan

COSTS = st.lists(st.floats(0.0, 1e15), max_size=40)


@settings(max_examples=200, deadline=None)
@given(costs=COSTS, ranks=st.integers(1, 9))
def test_everything_is_dealt_once_and_evenly(costs: list[float], ranks: int) -> None:
    dealt = deal(costs, ranks)
    assert sorted(i for items in dealt for i in items) == list(range(len(costs)))
    counts = [len(items) for items in dealt]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)
    assert all(items == sorted(items) for items in dealt)
    assert dealt == deal(costs, ranks)


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.floats(1.0, 100.0), min_size=1, max_size=40), ranks=st.integers(1, 6))
def test_no_rank_is_further_from_another_than_two_items_are(costs: list[float], ranks: int) -> None:
    costs = costs[: len(costs) // ranks * ranks]
    loads = [sum(costs[i] for i in items) for items in deal(costs, ranks)]
    assert max(loads) - min(loads) <= (max(costs) - min(costs) if costs else 0.0) + 1e-6


def packs(lengths: list[int], **values: int) -> PackPlan:
    ids = np.zeros(sum(lengths), np.uint32)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    dataset = TokenDataset(ids, np.ones(len(ids), np.uint8), offsets, np.arange(1, len(lengths) + 1), key="deal")
    return PackPlan(dataset, pack=True, pack_length=64, seed=1, **values)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=40), ranks=st.integers(2, 5), size=st.integers(1, 3),
    accumulation=st.integers(1, 9), fill=st.booleans(),
)
def test_the_ranks_of_a_step_train_what_one_process_trains(
    lengths: list[int], ranks: int, size: int, accumulation: int, fill: bool
) -> None:
    plan = packs(lengths, per_device_batch_size=size)
    cost = StepCost(a_token=3.0, a_square=0.1)
    shares = [DealtPacks(plan, rank=r, ranks=ranks, cost=cost, fill=fill) for r in range(ranks)]
    for first in range(0, len(plan), accumulation):
        step = (1, first, min(first + accumulation, len(plan)))
        alone = [e for batch in plan.of_step(*step) for e in batch.examples]
        batches = [list(share.of_step(*step)) for share in shares]
        assert sorted(e for rank in batches for b in rank for e in b.examples) == sorted(alone)
        assert sum(b.supervised_tokens for rank in batches for b in rank) == plan.supervised_tokens(*step)
        assert shares[0].supervised_tokens(*step) == plan.supervised_tokens(*step)
        counts = {len(rank) for rank in batches}
        assert not fill or len(counts) == 1
        places = [b.place for rank in batches for b in rank if b.place is not None]
        assert len(set(places)) == len(places)
        if size == 1:  # the dropout masks of one process
            by_place = {b.place: b.examples for rank in batches for b in rank if b.place is not None}
            assert by_place == {b.place: b.examples for b in plan.of_step(*step)}


def test_tokens_and_squares_both_count() -> None:
    """Two packs of 64 tokens, one of them a single document: its attention costs more than eight short ones'."""
    plan = packs([64, *[8] * 8, 64, *[8] * 8])
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
    cost = StepCost.of(Plan(mode="lora", lora_r=16), spec, 0.5)
    shares = [DealtPacks(plan, rank=r, ranks=2, cost=cost, fill=False) for r in (0, 1)]
    squares = [sum(int((b.cu_seqlens.diff().double() ** 2).sum()) for b in share.of_step(0, 0, 4)) for share in shares]
    assert len(plan) == 4
    assert squares[0] == squares[1]


def test_what_several_ranks_cannot_train_is_refused() -> None:
    refuse_ranks(Plan(engine="unsloth", gradient_accumulation=1), 1)
    refuse_ranks(Plan(per_device_batch_size=2, gradient_accumulation=2), 4)
    with pytest.raises(UsageError, match="Pass --gradient-accumulation 4 or more"):
        refuse_ranks(Plan(gradient_accumulation=3), 4)
    with pytest.raises(PreflightError, match="--engine unsloth trains on one GPU, and 2 processes"):
        refuse_ranks(Plan(engine="unsloth"), 2)
    with pytest.raises(PreflightError, match="--optimizer adamw_8bit keeps its moments"):
        refuse_ranks(Plan(mode="full", optimizer="adamw_8bit"), 2)
