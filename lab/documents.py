"""Which documents a bench trains on: the same set for ours and for every peer, laid out as each of them lays it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from sparktune.setup.data.binpack import pack_examples

__all__ = ["Documents", "add_document_flags", "documents_of", "long_tailed_lengths"]

SEED = 11
SIGMA = 0.9
"""Of the logarithm of a long-tailed length: a tenth of the documents are then 3 times the median or longer."""
SHORTEST = 64


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of one optimiser step."""

    name: str
    packs: tuple[tuple[int, ...], ...]
    """Lengths of the documents of each of our micro-batches."""
    row_tokens: int | None
    """Tokens that every micro-batch of ours is padded to, with one document that teaches nothing; None: no padding."""

    @property
    def real_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(sum, self.packs))

    @property
    def tokens(self) -> int:
        """Tokens that we compute, padding included."""
        return sum(max(sum(pack), self.row_tokens or 0) for pack in self.packs)


def long_tailed_lengths(count: int, mean: int, longest: int, seed: int = SEED) -> list[int]:
    """Returns `count` lengths of a log-normal law cut at `longest`, scaled so that their mean is `mean`.

    What lies beyond `longest` is cut to it, as an over-long example is truncated.

    Raises:
        ValueError: no such mean lies between the shortest and the longest length.
    """
    if not SHORTEST < mean < longest:
        raise ValueError(f"a mean of {mean} tokens does not lie between {SHORTEST} and {longest}.")
    draw = np.exp(SIGMA * np.random.default_rng(seed).standard_normal(count))

    def cut(scale: float) -> np.ndarray:
        return np.clip(draw * scale, SHORTEST, longest)

    low, high = SHORTEST / float(draw.max()), longest / float(draw.min())
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cut(middle).mean() < mean else (low, middle)
    return [int(n) for n in np.rint(cut(low))]


def add_document_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose the documents."""
    parser.add_argument("--lengths", help="documents of a micro-batch, comma-separated (default: 5376)")
    parser.add_argument("--accum", type=int, default=2, help="micro-batches a step (with --lengths)")
    parser.add_argument("--long-tailed", type=int, metavar="N", help="N documents a step, long-tailed")
    parser.add_argument("--mean", type=int, default=3000, help="mean tokens of a long-tailed document")
    parser.add_argument("--pack", type=int, default=5376, help="tokens of a pack of long-tailed documents")


def documents_of(options: argparse.Namespace) -> list[Documents]:
    """Returns the documents of a step, a set for each of --lengths and --long-tailed that is given."""
    found = []
    if options.lengths or options.long_tailed is None:
        pack = tuple(int(n) for n in (options.lengths or "5376").split(","))
        found.append(Documents(name=",".join(map(str, pack)), packs=(pack,) * options.accum, row_tokens=None))
    if options.long_tailed is not None:
        lengths = long_tailed_lengths(options.long_tailed, options.mean, options.pack)
        packs = tuple(tuple(lengths[i] for i in pack) for pack in pack_examples(lengths, options.pack, SEED))
        name = f"{len(lengths)} long-tailed, mean {sum(lengths) // len(lengths)}, packs of {options.pack}, seed {SEED}"
        found.append(Documents(name=name, packs=packs, row_tokens=options.pack))
    return found
