"""Examples into packs: best-fit decreasing, in O(n log n), never splitting an example. Pure numpy and integers.

A pack is a list of example indices whose tokens share one budget. An example longer than the budget rides alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["PAD_MULTIPLE", "pack_examples", "padded_length", "real_share"]

# A lone long example is padded to this, so that kernels meet few distinct shapes.
PAD_MULTIPLE = 128


def padded_length(tokens: int, pack_length: int) -> int:
    """Returns the static length a pack of `tokens` tokens is padded to.

    Packs within the budget take the budget; a lone longer example takes the next multiple of 128.

    Args:
        tokens: real tokens of the pack, at least 1.
        pack_length: the token budget.
    """
    if tokens <= pack_length:
        return pack_length
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def pack_examples(lengths: npt.ArrayLike, budget: int, seed: int | Sequence[int] = 0) -> list[list[int]]:
    """Packs examples by best-fit decreasing: longest first, each into the fullest pack it still fits.

    The number of packs depends on the lengths alone; `seed` only decides which of several equally long examples
    takes a place.

    Args:
        lengths: [n] tokens of each example, each at least 1.
        budget: token budget of a pack, at least 1.
        seed: seed (or entropy words) of the tie-breaking; the same seed gives the same packs.

    Returns:
        Packs of indices into `lengths`, longest example first in each; every index appears exactly once.

    Raises:
        ValueError: a length or the budget is below 1, or lengths are not one-dimensional.

    Source: best-fit decreasing, D. S. Johnson, Near-optimal bin packing algorithms (1973).
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.ndim != 1:
        raise ValueError(f"lengths must be one-dimensional; got shape {sizes.shape}.")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token; got {budget}.")
    if sizes.size and int(sizes.min()) < 1:
        raise ValueError(f"every example needs at least 1 token; example {int(sizes.argmin())} has {int(sizes.min())}.")
    ties = np.random.default_rng(seed).permutation(sizes.size)
    order = np.lexsort((ties, -sizes))

    packs: list[list[int]] = []
    spaces = _Spaces()
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size > budget:
            packs.append([index])
            continue
        space, pack = spaces.take_tightest(size)
        if pack is None:
            space, pack = budget, len(packs)
            packs.append([])
        packs[pack].append(index)
        if space > size:
            spaces.put(space - size, pack)
    return packs


class _Spaces:
    """Open packs by the space left in them; finds the tightest one that fits in a constant number of integer steps.

    Bit s of block b says whether a pack with exactly 1024 b + s tokens left is open; bit b of `summary` whether
    block b has any bit set. The tightest fit is the lowest set bit at or above the size.
    """

    def __init__(self) -> None:
        self._packs: dict[int, list[int]] = {}
        self._blocks: dict[int, int] = {}
        self._summary = 0

    def put(self, space: int, pack: int) -> None:
        self._packs.setdefault(space, []).append(pack)
        self._blocks[space >> 10] = self._blocks.get(space >> 10, 0) | 1 << (space & 1023)
        self._summary |= 1 << (space >> 10)

    def take_tightest(self, size: int) -> tuple[int, int | None]:
        """Removes and returns (space, pack) of the fullest open pack with at least `size` left; pack None if none."""
        block = size >> 10
        bits = self._blocks.get(block, 0) >> (size & 1023) << (size & 1023)
        if not bits:
            above = self._summary >> (block + 1)
            if not above:
                return 0, None
            block += 1 + _lowest_bit(above)
            bits = self._blocks[block]
        space = (block << 10) + _lowest_bit(bits)
        waiting = self._packs[space]
        pack = waiting.pop()
        if not waiting:
            self._blocks[block] &= ~(1 << (space & 1023))
            if not self._blocks[block]:
                self._summary &= ~(1 << block)
        return space, pack


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def real_share(lengths: npt.ArrayLike, pack_length: int) -> float:
    """Returns the share of real tokens in padded packs of `pack_length`; 0.0 without examples.

    Args:
        lengths: [n] tokens of each example.
        pack_length: the token budget of a pack.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not sizes.size:
        return 0.0
    packs = pack_examples(sizes, pack_length)
    padded = sum(padded_length(int(sizes[pack].sum()), pack_length) for pack in packs)
    return float(sizes.sum() / padded)
