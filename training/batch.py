"""The micro-batch: one row of documents laid end to end, with everything a step needs to keep them apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["IGNORE_INDEX", "MicroBatch", "documents", "to_device"]

IGNORE_INDEX = -100


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns x on `device` without waiting for it: copies from pageable memory above 64 KiB wait for all work."""
    if device.type == "cuda" and not x.is_cuda and x.numel():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass. T tokens, N documents, S supervised targets."""

    ids: torch.Tensor
    """[T] int64: token ids, documents end to end."""
    position_ids: torch.Tensor
    """[T] int64: position inside the own document, from 0."""
    cu_seqlens: torch.Tensor
    """[N + 1] int32: document boundaries, from 0 to T, strictly increasing."""
    cu_seqlens_cpu: torch.Tensor
    """The same on the host, so that no op has to synchronise to read it."""
    max_seqlen: int
    """Longest document."""
    supervised_rows: torch.Tensor
    """[S] int64: indices t whose next token t + 1 (same document) is supervised; sorted."""
    targets: torch.Tensor
    """[S] int64: ids[t + 1] for those t."""
    examples: tuple[int, ...]
    """Indices of the examples in the token cache, in document order; padding documents are not listed."""
    real_tokens: int
    """Tokens that are not padding."""
    place: int | None = None
    """Number of its first pack in the whole run's order, if it has one: dropout masks follow from it."""

    @property
    def supervised_tokens(self) -> int:
        """Number of targets; known on the host."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        """Returns a copy on `device`; `cu_seqlens_cpu` stays on the host."""
        move = {f: to_device(getattr(self, f), device)
                for f in ("ids", "position_ids", "cu_seqlens", "supervised_rows", "targets")}
        return MicroBatch(
            **move, cu_seqlens_cpu=self.cu_seqlens_cpu, max_seqlen=self.max_seqlen, examples=self.examples,
            real_tokens=self.real_tokens, place=self.place,
        )


def documents(batch: MicroBatch) -> Iterator[MicroBatch]:
    """Yields each example of a micro-batch as a micro-batch of its own; padding is left out."""
    bounds = batch.cu_seqlens_cpu.tolist()
    for example, first, end in zip(batch.examples, bounds, bounds[1:], strict=False):
        mine = (batch.supervised_rows >= first) & (batch.supervised_rows < end)
        cu_seqlens = torch.tensor([0, end - first], dtype=torch.int32)
        yield MicroBatch(
            ids=batch.ids[first:end], position_ids=batch.position_ids[first:end],
            cu_seqlens=cu_seqlens.to(batch.ids.device), cu_seqlens_cpu=cu_seqlens, max_seqlen=end - first,
            supervised_rows=batch.supervised_rows[mine] - first, targets=batch.targets[mine], examples=(example,),
            real_tokens=end - first,
        )
