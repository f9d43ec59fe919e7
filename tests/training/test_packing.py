"""Packs and micro-batches: targets stay inside documents, order is a pure function, counts are exact beforehand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sparktune.setup.data.cache import TokenDataset
from sparktune.training.packing import PackPlan, build_micro_batch


def make_dataset(lengths, seed=0, share=0.4, key="key"):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    ids = rng.integers(1, 1000, offsets[-1]).astype(np.uint32)
    supervised = (rng.random(offsets[-1]) < share).astype(np.uint8)
    return TokenDataset(ids, supervised, offsets, np.arange(len(lengths)) * 2 + 1, key)


LENGTHS = np.random.default_rng(3).integers(1, 90, 60).tolist()


def make_plan(dataset, **fields):
    return PackPlan(dataset, **{"pack": True, "pack_length": 128, **fields})


def every(plan, epoch=0):
    return [plan.micro_batch(epoch, index) for index in range(len(plan))]


def targets_by_hand(dataset, batch):
    """(row, target) by the definition, document by document."""
    found, start = [], 0
    for example in batch.examples:
        ids, supervised = dataset[example]
        found += [(start + t, int(ids[t + 1])) for t in range(len(ids) - 1) if supervised[t + 1]]
        start += len(ids)
    return found


@pytest.mark.parametrize("fields", [{}, {"pad": True}, {"pack": False}, {"per_device_batch_size": 3, "pad": True}])
def test_a_micro_batch_is_what_its_documents_say(fields):
    dataset = make_dataset(LENGTHS)
    plan = make_plan(dataset, **fields)
    for batch in every(plan):
        documents = [dataset[example][0] for example in batch.examples]
        real = sum(map(len, documents))
        assert batch.real_tokens == real
        assert batch.ids[:real].tolist() == np.concatenate(documents).tolist()
        bounds = batch.cu_seqlens_cpu.tolist()
        assert bounds[: len(documents) + 1] == [0, *itertools.accumulate(map(len, documents))]
        assert bounds[-1] == len(batch.ids)
        assert all(a < b for a, b in itertools.pairwise(bounds))
        assert batch.cu_seqlens.equal(batch.cu_seqlens_cpu)
        assert batch.cu_seqlens.data_ptr() != batch.cu_seqlens_cpu.data_ptr()
        assert batch.position_ids.tolist() == [i for a, b in itertools.pairwise(bounds) for i in range(b - a)]
        assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(bounds))
        assert list(zip(batch.supervised_rows.tolist(), batch.targets.tolist(), strict=True)) == targets_by_hand(
            dataset, batch
        )
        assert plan.lines(batch) == [2 * example + 1 for example in batch.examples]
    dtypes = {"ids": torch.int64, "position_ids": torch.int64, "cu_seqlens": torch.int32, "targets": torch.int64,
              "supervised_rows": torch.int64, "cu_seqlens_cpu": torch.int32}
    assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes


@pytest.mark.parametrize("fields", [{}, {"pack": False}, {"per_device_batch_size": 4}])
def test_an_epoch_sees_every_example_once(fields):
    plan = make_plan(make_dataset(LENGTHS), **fields)
    for epoch in range(3):
        assert sorted(e for b in every(plan, epoch) for e in b.examples) == list(range(60))


def test_order_is_a_function_of_key_seed_and_epoch_only():
    def order(epoch, jump=(), **kwargs):
        key = kwargs.pop("key", "key")
        plan = make_plan(make_dataset(LENGTHS, key=key), seed=kwargs.pop("seed", 7), **kwargs)
        for other in jump:  # going back and forth between epochs changes nothing
            plan.micro_batch(other, 0)
        return [batch.examples for batch in every(plan, epoch)]

    assert order(2) == order(2, jump=(5, 0, 1))
    different = [order(2), order(1), order(2, seed=8), order(2, key="other")]
    assert all(a != b for a, b in itertools.combinations(different, 2))
    assert order(0, shuffle=False) == order(3, shuffle=False)


def test_epochs_are_equally_long_and_the_tie_breaking_varies():
    plan = make_plan(make_dataset([40] * 30 + [50] * 30))
    packs = [[frozenset(p) for i in range(len(plan)) for p in plan.packs(epoch, i)] for epoch in range(4)]
    assert {len(p) for p in packs} == {plan.packs_per_epoch}
    assert set(packs[0]) != set(packs[1])


def test_supervised_tokens_are_known_without_building():
    plan = make_plan(make_dataset(LENGTHS), per_device_batch_size=2)
    for first, last in ((0, 1), (0, len(plan)), (3, 5), (2, 2)):
        built = sum(plan.micro_batch(1, i).supervised_tokens for i in range(first, last))
        assert plan.supervised_tokens(1, first, last) == built


def test_a_longer_example_rides_alone_and_is_padded_to_a_multiple_of_128():
    dataset = make_dataset([300, 20, 30])
    plan = make_plan(dataset, pad=True)
    by_examples = {batch.examples: batch for batch in every(plan)}
    assert len(by_examples[0,].ids) == 384
    (rest,) = [batch for examples, batch in by_examples.items() if examples != (0,)]
    assert sorted(rest.examples) == [1, 2]
    assert len(rest.ids) == 128
    assert plan.real_share == pytest.approx(350 / 512)
    assert "3 examples in 2 packs of 128 tokens (1 longer ones ride alone)" in plan.describe()
    assert "68.4 % real tokens" in plan.describe()


def test_padding_is_a_document_of_its_own_with_nothing_to_learn():
    dataset = make_dataset([10, 20], share=1.0)
    bare, padded = build_micro_batch(dataset, [0, 1]), build_micro_batch(dataset, [0, 1], pad_to=64)
    assert padded.cu_seqlens.tolist() == [0, 10, 30, 64]
    assert padded.supervised_rows.equal(bare.supervised_rows)
    assert padded.targets.equal(bare.targets)
    assert padded.examples == (0, 1)
    assert padded.real_tokens == bare.real_tokens == 30
    assert build_micro_batch(dataset, [0, 1], pad_to=30).cu_seqlens.tolist() == [0, 10, 30]
    with pytest.raises(ValueError, match="pad_to is 29"):
        build_micro_batch(dataset, [0, 1], pad_to=29)


def test_nothing_is_learned_across_a_boundary():
    dataset = make_dataset([4, 5, 1], share=1.0)
    batch = build_micro_batch(dataset, [0, 1, 2])
    assert batch.supervised_rows.tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_zero_supervised_rows_and_one_token_documents_work():
    dataset = make_dataset([5, 1, 3], share=0.0)
    batch = build_micro_batch(dataset, [0, 1, 2])
    assert batch.supervised_tokens == 0
    assert (batch.targets.dtype, batch.supervised_rows.dtype) == (torch.int64, torch.int64)
    assert make_plan(dataset).supervised_tokens(0, 0, 1) == 0
    assert batch.to(torch.device("cpu")).targets.shape == (0,)


def test_the_last_micro_batch_may_be_smaller():
    plan = make_plan(make_dataset([100] * 7), per_device_batch_size=3)
    assert [len(batch.examples) for batch in every(plan)] == [3, 3, 1]
    with pytest.raises(IndexError):
        plan.micro_batch(0, 3)
    assert [b.examples for b in plan] == [b.examples for b in every(plan)]


@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_real_share_of_a_long_tail(sigma):
    lengths = np.random.default_rng(0).lognormal(np.log(300) - sigma**2 / 2, sigma, 2000).clip(4, 2048).astype(int)
    plan = make_plan(make_dataset(lengths), pack_length=768, pad=True)
    batches = every(plan)
    share = sum(b.real_tokens for b in batches) / sum(len(b.ids) for b in batches)
    assert share == pytest.approx(plan.real_share)
    assert share >= 0.85


def test_bad_settings_are_named():
    dataset = make_dataset([3])
    with pytest.raises(ValueError, match="--no-pack"):
        PackPlan(dataset, pack=True, pack_length=None)
    with pytest.raises(ValueError, match="at least 1"):
        PackPlan(dataset, pack=True, pack_length=0)
    with pytest.raises(ValueError, match="at least one example"):
        build_micro_batch(dataset, [])
    empty = make_plan(make_dataset([]))
    assert (len(empty), empty.real_share) == (0, 0.0)
