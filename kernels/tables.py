"""Tables that tell a kernel where the documents of a row lie: made once a row, or kept at one address for CUDA graphs.

A captured graph replays the launches it saw: same grids, same addresses. So that one graph serves every packing of a
row of T tokens, its tables live in buffers of a fixed number of rows, rewritten before each replay; rows that a packing
does not need say "a document from T to T", which no kernel finds work in.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch

__all__ = ["StaticTables", "boundaries_of", "document_table"]

Rows = Callable[[tuple[int, ...]], Sequence[tuple[int, ...]]]

_KEPT = 128
_tables: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()
_checked: tuple[weakref.ref[torch.Tensor] | None, int, tuple[int, ...]] = (None, 0, ())
"""The boundaries that were read last: every layer of a row asks for the same ones."""


def boundaries_of(cu_seqlens_cpu: torch.Tensor, n_tokens: int) -> tuple[int, ...]:
    """Returns a row's document boundaries as numbers, read and checked once a row rather than once a layer.

    Args:
        cu_seqlens_cpu: int32 [N + 1] on the host.
        n_tokens: T of the row.

    Raises:
        ValueError: they do not rise strictly from 0 to T; a kernel would read out of bounds.
    """
    global _checked
    known, version, boundaries = _checked
    if known is None or known() is not cu_seqlens_cpu or version != cu_seqlens_cpu._version:
        boundaries = tuple(cu_seqlens_cpu.tolist())
        rising = all(a < b for a, b in itertools.pairwise(boundaries))
        if len(boundaries) < 2 or boundaries[0] != 0 or not rising:
            raise ValueError(
                f"cu_seqlens must rise strictly from 0 to T = {n_tokens}; got {boundaries[:4]}...{boundaries[-1:]}."
            )
        _checked = weakref.ref(cu_seqlens_cpu), cu_seqlens_cpu._version, boundaries
    if boundaries[-1] != n_tokens:
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to T = {n_tokens}; got {boundaries[:4]}...{boundaries[-1:]}."
        )
    return boundaries


def document_table(
    name: tuple[object, ...], boundaries: tuple[int, ...], device: torch.device, rows: Rows, *, width: int,
    block: int | None,
) -> torch.Tensor:
    """Returns a table of documents or of their blocks, int32 [rows, width], kept by value of the arguments.

    Args:
        name: which table; two tables of one name have the same `rows` function.
        boundaries: document boundaries, N + 1 numbers from 0 to T.
        device: where the kernels run.
        rows: makes the table's rows of the boundaries.
        width: numbers a row.
        block: tokens a row stands for at most, or None for one row a document.
    """
    if StaticTables.active is not None:
        return StaticTables.active.table(name, boundaries, rows, width=width, block=block)
    key = (name, boundaries, device)
    found = _tables.get(key)
    if found is not None:
        _tables.move_to_end(key)
        return found
    table = _on_host(rows(boundaries), width, device).to(device, non_blocking=True)
    _tables[key] = table
    while len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return table


def _on_host(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> torch.Tensor:
    host = torch.tensor(rows, dtype=torch.int32).reshape(-1, width)
    return host.pin_memory() if device.type == "cuda" else host


class StaticTables:
    """The tables of rows of T tokens and at most N documents, at fixed addresses.

    Args:
        n_tokens: T, of every row.
        max_documents: N.
        device: where the kernels run.
    """

    active: ClassVar[StaticTables | None] = None
    """The tables that ops use while `serving()`; a backward pass runs in a thread of its own, so not a context
    variable."""

    def __init__(self, n_tokens: int, max_documents: int, device: torch.device) -> None:
        self.n_tokens, self.max_documents, self.device = n_tokens, max_documents, device
        self._tables: dict[tuple[object, ...], tuple[torch.Tensor, Rows]] = {}

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Within it, ops read these tables instead of their own."""
        assert StaticTables.active is None, "one graph is captured at a time"
        StaticTables.active = self
        try:
            yield
        finally:
            StaticTables.active = None

    def table(
        self, name: tuple[object, ...], boundaries: tuple[int, ...], rows: Rows, *, width: int, block: int | None
    ) -> torch.Tensor:
        """Returns the table `name`, made and filled when first asked for."""
        if name not in self._tables:
            # Every document adds at most one block that is not full.
            capacity = self.max_documents + (self.n_tokens // block if block is not None else 0)
            buffer = torch.empty((capacity, width), dtype=torch.int32, device=self.device)
            self._tables[name] = (buffer, rows)
            self._fill(buffer, rows, boundaries)
        return self._tables[name][0]

    def refill(self, boundaries: tuple[int, ...]) -> None:
        """Rewrites every table for another packing. Raises ValueError if it has other tokens or too many documents."""
        if boundaries[-1] != self.n_tokens or len(boundaries) - 1 > self.max_documents:
            raise ValueError(
                f"these tables serve rows of {self.n_tokens} tokens and at most {self.max_documents} documents; got "
                f"{boundaries[-1]} tokens in {len(boundaries) - 1} documents"
            )
        for buffer, rows in self._tables.values():
            self._fill(buffer, rows, boundaries)

    def _fill(self, buffer: torch.Tensor, rows: Rows, boundaries: tuple[int, ...]) -> None:
        filled = list(rows(boundaries))
        filled += [(self.n_tokens,) * buffer.shape[1]] * (buffer.shape[0] - len(filled))
        buffer.copy_(_on_host(filled, buffer.shape[1], self.device), non_blocking=True)
