"""Which examples share a micro-batch, in which order, and the micro-batch itself.

The order is a pure function of (cache key, seed, epoch), so a position in the data is one integer and a resume needs
no saved permutation. Counts are known before anything is built: the loss's denominator is exact before backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from sparktune.setup.data.binpack import PAD_MULTIPLE, pack_examples, padded_length
from sparktune.setup.data.cache import TokenDataset
from sparktune.training.batch import MicroBatch

__all__ = ["PackPlan", "build_micro_batch"]

# Padding documents hold this id; they have no supervised row and no other document sees them.
_PAD_ID = 0


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """The packs of one epoch in training order."""

    number: int
    packs: list[list[int]]


class PackPlan:
    """Micro-batches of a token dataset in their order; the same epoch and index give the same one, always.

    Args:
        dataset: examples of one part (training or evaluation).
        pack: several examples share a pack; otherwise an example is a pack of its own.
        pack_length: token budget of a pack; needed when `pack` is true.
        per_device_batch_size: packs laid end to end in a micro-batch.
        seed: seed of the order.
        shuffle: shuffle packs anew each epoch; otherwise every epoch is in the order of the data's packs.
        pad: fill micro-batches up to their static length with one trailing padding document.

    Raises:
        ValueError: `pack` without `pack_length`, or a size below 1.
    """

    def __init__(
        self, dataset: TokenDataset, *, pack: bool, pack_length: int | None, per_device_batch_size: int = 1,
        seed: int = 0, shuffle: bool = True, pad: bool = False,
    ) -> None:
        if pack and pack_length is None:
            raise ValueError("Packing needs a token budget: give pack_length, or turn packing off with --no-pack.")
        if per_device_batch_size < 1 or (pack_length is not None and pack_length < 1):
            raise ValueError(
                f"per_device_batch_size and pack_length must be at least 1; got {per_device_batch_size}, {pack_length}."
            )
        self.dataset = dataset
        self.pack_length = pack_length if pack else None
        self.per_device_batch_size = per_device_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.pad = pad
        self._lengths = dataset.lengths
        self._supervised = dataset.supervised_counts
        self._epoch = self._make_epoch(0)
        # Best-fit decreasing makes the same number of packs whatever the tie-breaking, so all epochs are equally long.
        self.packs_per_epoch = len(self._epoch.packs)
        self._padded_tokens = sum(self.static_length([pack]) for pack in self._epoch.packs)

    def __len__(self) -> int:
        """Micro-batches of one epoch; the last may hold fewer packs."""
        return -(-self.packs_per_epoch // self.per_device_batch_size)

    @property
    def real_share(self) -> float:
        """Share of real tokens in micro-batches padded to their static length; 0.0 without examples."""
        return int(self._lengths.sum()) / self._padded_tokens if self._padded_tokens else 0.0

    def packs(self, epoch: int, index: int) -> list[list[int]]:
        """Returns the packs of micro-batch `index` of `epoch`: lists of example indices.

        Raises:
            IndexError: there is no such micro-batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of an epoch of {len(self)}")
        if self._epoch.number != epoch:
            self._epoch = self._make_epoch(epoch)
        first = index * self.per_device_batch_size
        return self._epoch.packs[first : first + self.per_device_batch_size]

    def supervised_tokens(self, epoch: int, first: int, last: int) -> int:
        """Returns the number of targets in micro-batches first..last - 1 of `epoch`, without building them."""
        examples = [example for index in range(first, last) for pack in self.packs(epoch, index) for example in pack]
        return int(self._supervised[examples].sum()) if examples else 0

    def static_length(self, packs: Sequence[Sequence[int]]) -> int:
        """Returns the tokens of a micro-batch of `packs` once padded: multiples of 128, or pack_length each."""
        budget = self.pack_length if self.pack_length is not None else PAD_MULTIPLE
        return sum(padded_length(int(self._lengths[list(pack)].sum()), budget) for pack in packs)

    def work(self, epoch: int, first: int, last: int) -> tuple[int, int]:
        """Returns (tokens, sum of the documents' squared lengths) of micro-batches first..last - 1, as computed."""
        parts = [self.work_of(self.packs(epoch, index)) for index in range(first, last)]
        return sum(tokens for tokens, _ in parts), sum(squares for _, squares in parts)

    def work_of(self, packs: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Returns (tokens, sum of the documents' squared lengths) of one micro-batch of `packs`, as computed."""
        lengths = self._lengths[[example for pack in packs for example in pack]]
        real = int(lengths.sum())
        padding = self.static_length(packs) - real if self.pad else 0
        return real + padding, int((lengths.astype(np.int64) ** 2).sum()) + padding**2

    def place(self, epoch: int, index: int) -> int:
        """Returns the number of micro-batch `index`'s first pack, counted over all epochs."""
        return epoch * self.packs_per_epoch + index * self.per_device_batch_size

    def micro_batch(self, epoch: int, index: int) -> MicroBatch:
        """Returns micro-batch `index` of `epoch`, on the CPU."""
        return self.build(self.packs(epoch, index), self.place(epoch, index))

    def of_step(self, epoch: int, first: int, last: int) -> Iterator[MicroBatch]:
        """Yields micro-batches first..last - 1, each built when it is asked for."""
        return (self.micro_batch(epoch, index) for index in range(first, last))

    def build(self, packs: Sequence[Sequence[int]], place: int) -> MicroBatch:
        """Returns the micro-batch of `packs`, whose first one has the number `place`."""
        examples = [example for pack in packs for example in pack]
        batch = build_micro_batch(self.dataset, examples, pad_to=self.static_length(packs) if self.pad else None)
        return replace(batch, place=place)

    def padding(self) -> MicroBatch:
        """Returns a micro-batch that holds padding alone and teaches nothing."""
        length = (self.pack_length or PAD_MULTIPLE) if self.pad else 1
        return build_micro_batch(self.dataset, [], pad_to=length)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields the micro-batches of epoch 0: one pass, for evaluation."""
        return (self.micro_batch(0, index) for index in range(len(self)))

    def lines(self, micro_batch: MicroBatch) -> list[int]:
        """Returns the line numbers, in the data file, of a micro-batch's examples."""
        return self.dataset.lines[list(micro_batch.examples)].tolist()

    def describe(self) -> str:
        """Returns one line for the log: examples, packs, micro-batches, share of real tokens."""
        share = f"{100 * self.real_share:.1f} % real tokens when padded"
        if self.pack_length is None:
            return f"{len(self.dataset):,} examples, unpacked, in {len(self):,} micro-batches an epoch; {share}."
        alone = int((self._lengths > self.pack_length).sum())
        note = f" ({alone:,} longer ones ride alone)" if alone else ""
        return (
            f"{len(self.dataset):,} examples in {self.packs_per_epoch:,} packs of {self.pack_length:,} tokens{note}, "
            f"{len(self):,} micro-batches an epoch; {share}."
        )

    def _make_epoch(self, epoch: int) -> _Epoch:
        words = _entropy(self.dataset.key, self.seed, epoch if self.shuffle else 0)
        if self.pack_length is None:
            packs = [[example] for example in range(len(self.dataset))]
        else:
            packs = pack_examples(self._lengths, self.pack_length, words)
        if self.shuffle:
            order = np.random.default_rng([*words, 1]).permutation(len(packs))
            packs = [packs[i] for i in order.tolist()]
        return _Epoch(number=epoch, packs=packs)


def _entropy(key: str, seed: int, epoch: int) -> list[int]:
    """Returns eight 32-bit words that depend on all of (key, seed, epoch)."""
    digest = hashlib.sha256(f"{key}:{seed}:{epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.int64).tolist()


def build_micro_batch(dataset: TokenDataset, examples: Sequence[int], pad_to: int | None = None) -> MicroBatch:
    """Lays examples end to end as one row of documents that stay apart, with pre-shifted targets.

    The target of token t is token t + 1 if both are of one document and t + 1 is supervised; nothing is learned across
    a boundary.

    Args:
        dataset: the token cache.
        examples: indices into it, in document order; none only with `pad_to`.
        pad_to: total tokens wanted; the difference becomes one trailing document without supervised rows.

    Raises:
        ValueError: no tokens at all, or `pad_to` is shorter than the examples are.
    """
    if not examples and not pad_to:
        raise ValueError("a micro-batch needs at least one example, or padding")
    documents = [dataset[example] for example in examples]
    ids = [np.asarray(document_ids, dtype=np.int64) for document_ids, _ in documents]
    lengths = [len(document_ids) for document_ids in ids]
    real = sum(lengths)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    rows: list[npt.NDArray[np.int64]] = []
    for start, (_, supervised) in zip(starts.tolist(), documents, strict=False):
        rows.append(np.flatnonzero(supervised[1:]) + start)
    if pad_to is not None and pad_to != real:
        if pad_to < real:
            raise ValueError(f"pad_to is {pad_to} tokens but the examples have {real}.")
        ids.append(np.full(pad_to - real, _PAD_ID, dtype=np.int64))
        lengths.append(pad_to - real)
    row_ids = np.concatenate(ids)
    supervised_rows = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    return MicroBatch(
        ids=torch.from_numpy(row_ids),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens.clone(),
        max_seqlen=max(lengths),
        supervised_rows=torch.from_numpy(supervised_rows),
        targets=torch.from_numpy(row_ids[supervised_rows + 1]),
        examples=tuple(int(example) for example in examples),
        real_tokens=real,
    )
