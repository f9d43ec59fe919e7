"""Deals the packs of a step to the ranks that train together, so that all of them are busy equally long.

A step is the same step on any number of ranks: the same packs, the same supervised tokens, the same update. Every
rank computes the deal for itself from what all of them know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparktune.setup.plan.arithmetic import training_flop
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.training.batch import MicroBatch
from sparktune.training.packing import PackPlan

__all__ = ["DealtPacks", "StepCost", "deal"]


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The arithmetic of a step, as a linear function of its tokens and of the sum of its documents' squared lengths."""

    a_token: float
    a_square: float

    @classmethod
    def of(cls, plan: Plan, spec: ModelSpec, supervised_share: float) -> StepCost:
        """Returns the cost of a model's steps."""
        zero, one = (training_flop(plan, spec, document=d, supervised_share=supervised_share) for d in (0.0, 1.0))
        return cls(a_token=zero, a_square=one - zero)

    def __call__(self, tokens: int, squares: int) -> float:
        """Returns the FLOP of a step."""
        return self.a_token * tokens + self.a_square * squares


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deals items so that every rank gets equally many, within one, and as nearly the same cost as swaps can make it.

    The dearest item goes first, each to the rank with the least so far that still has room; then items of the most and
    the least loaded rank change places for as long as that brings the two closer. Where the items divide evenly, two
    ranks end no further apart than the dearest and the cheapest item are.

    Args:
        costs: of each item, not negative.
        ranks: at least 1.

    Returns:
        For each rank the indices of its items, ascending; the first ranks have one more where it does not divide.
    """
    low, more = divmod(len(costs), ranks)
    room = [low + (rank < more) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < room[r]), key=lambda r: (load[r], r))
        dealt[rank].append(item)
        load[rank] += costs[item]
    for _ in range(len(costs)):
        if not _swapped(costs, dealt):
            break
    return [sorted(items) for items in dealt]


def _swapped(costs: Sequence[float], dealt: list[list[int]]) -> bool:
    """Swaps the pair that brings the most and the least loaded rank closest; says whether one did."""
    load = [sum(costs[i] for i in items) for items in dealt]
    high, low = load.index(max(load)), load.index(min(load))
    gap = load[high] - load[low]
    best, pair = gap, None
    for a, heavy in enumerate(dealt[high]):
        for b, light in enumerate(dealt[low]):
            after = abs(gap - 2 * (costs[heavy] - costs[light]))
            if after < best * (1 - 1e-9):
                best, pair = after, (a, b)
    if pair is None:
        return False
    a, b = pair
    dealt[high][a], dealt[low][b] = dealt[low][b], dealt[high][a]
    return True


class DealtPacks:
    """One rank's share of every step of a PackPlan; everything that is not a share is the whole plan's.

    Args:
        packs: all packs in their order.
        rank: this rank.
        ranks: how many there are.
        cost: of a pack.
        fill: give every rank equally many micro-batches, by one of padding alone where it has fewer: sharded weights
            are gathered by all ranks or by none.
    """

    def __init__(self, packs: PackPlan, *, rank: int, ranks: int, cost: StepCost, fill: bool) -> None:
        self.packs, self.rank, self.ranks, self.cost, self.fill = packs, rank, ranks, cost, fill

    def __len__(self) -> int:
        """Micro-batches of an epoch, as one process would train them."""
        return len(self.packs)

    def micro_batch(self, epoch: int, index: int) -> MicroBatch:
        """Returns one micro-batch as one process would train it."""
        return self.packs.micro_batch(epoch, index)

    def supervised_tokens(self, epoch: int, first: int, last: int) -> int:
        """Returns the targets of all ranks together."""
        return self.packs.supervised_tokens(epoch, first, last)

    def lines(self, micro_batch: MicroBatch) -> list[int]:
        """Returns the lines of a micro-batch's examples."""
        return self.packs.lines(micro_batch)

    def describe(self) -> str:
        """Returns one line for the log."""
        return f"{self.packs.describe()} Every step's packs are dealt to {self.ranks} ranks by their cost."

    def of_step(self, epoch: int, first: int, last: int) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches of the step that consists of micro-batches first..last - 1.

        Of `per_device_batch_size` packs each, the last of what is left; none for a rank without a pack unless `fill`.
        """
        size = self.packs.per_device_batch_size
        packs = [pack for index in range(first, last) for pack in self.packs.packs(epoch, index)]
        costs = [self.cost(*self.packs.work_of([pack])) for pack in packs]
        mine = deal(costs, self.ranks)[self.rank]
        count = 0
        for start in range(0, len(mine), size):
            chosen = mine[start : start + size]
            yield self.packs.build([packs[i] for i in chosen], self.packs.place(epoch, first) + chosen[0])
            count += 1
        most = -(-len(packs) // self.ranks)
        for _ in range(count, -(-most // size) if self.fill else count):
            yield self.packs.padding()
