"""Which rows of a micro-batch are drafted from, and which of the base's rows say what the draft should have been.

A draft is made after the base has chosen a token of an answer. So the anchor t must be a supervised row (its next token
t + 1 is learned), and draft k of it is judged by the base's own row t + k, which must be one too. Supervised rows never
span two documents, so no pair of anchor and judge does. Legend: S rows a depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparktune.training.batch import MicroBatch, to_device

__all__ = ["DraftRows", "draft_rows"]


@dataclass(frozen=True, kw_only=True)
class DraftRows:
    """The pairs of one micro-batch, by depth; the rows of each depth are a subset of those of the one before."""

    judges: torch.Tensor
    """int64 [S_1]: the base's rows t + 1, sorted; every deeper judge is among them."""
    anchors: tuple[torch.Tensor, ...]
    """Per depth int64 [S_k]: the rows t."""
    places: tuple[torch.Tensor, ...]
    """Per depth int64 [S_k], on the host: the judge's place in `judges`, sorted."""
    labels: tuple[torch.Tensor, ...]
    """Per depth int64 [S_k]: the document's token t + k + 1."""
    judged: tuple[torch.Tensor, ...] = ()
    """`places` on the device of the rest, where `to` has put it."""

    def counts(self) -> list[int]:
        """Returns S_k of every depth."""
        return [len(a) for a in self.anchors]

    def to(self, device: torch.device) -> DraftRows:
        """Returns a copy on `device`, `places` on both."""
        def move(xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(to_device(x, device) for x in xs)

        return DraftRows(judges=to_device(self.judges, device), anchors=move(self.anchors), places=self.places,
                         labels=move(self.labels), judged=move(self.places))


def draft_rows(batch: MicroBatch, depth: int) -> DraftRows:
    """Returns the pairs of a micro-batch that lies on the CPU.

    Args:
        batch: the micro-batch.
        depth: drafts, at least 1.
    """
    learned = torch.zeros(batch.ids.shape[0] + 1, dtype=torch.bool)
    learned[batch.supervised_rows] = True
    next_token = torch.cat((batch.ids[1:], batch.ids.new_zeros(1)))
    judged = learned[:-1].clone()
    anchors, judges = [], []
    for k in range(1, depth + 1):
        # judged[r]: the rows r - k, ..., r are all supervised; a document's last row never is
        shifted = torch.zeros_like(judged)
        shifted[k:] = learned[:-1][:-k] if k < len(judged) else False
        judged = judged & shifted
        rows = judged.nonzero().flatten()
        judges.append(rows)
        anchors.append(rows - k)
    return DraftRows(
        judges=judges[0], anchors=tuple(anchors),
        places=tuple(torch.searchsorted(judges[0], rows) for rows in judges),
        labels=tuple(next_token[rows] for rows in judges),
    )
