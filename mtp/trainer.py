"""One optimiser step of an MTP head on a frozen base: hidden states, drafts, loss, AdamW over float32 masters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparktune.mtp.head import MtpHead
from sparktune.mtp.losses import LossKind, depth_weights, draft_losses, plain_losses
from sparktune.mtp.rows import draft_rows
from sparktune.training.batch import MicroBatch
from sparktune.training.graphs import ForwardGraphs
from sparktune.training.optimiser import MasterAdamW
from sparktune.training.tower import TextTower

__all__ = ["HeadTrainer", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a head learns."""

    depth: int = 2
    """Drafts that are unrolled: as many as serving makes."""
    loss: LossKind = "kl"
    """What a draft is taught (mtp/losses.py)."""
    lm_head_opt: bool = True
    """Logits block by block, gradient in place; off, all logits of the supervised rows through autograd."""
    max_grad_norm: float = 1.0


class HeadTrainer:
    """A head that learns on a base that does not.

    Args:
        tower: the fine-tuned model, filled; frozen here.
        head: warm, on the same device and in the same type.
        recipe: how it learns.
    """

    def __init__(self, tower: TextTower, head: MtpHead, recipe: Recipe) -> None:
        self.tower, self.head, self.recipe = tower, head, recipe
        tower.eval().requires_grad_(False)
        head.make_trainable()
        self.weights = depth_weights(recipe.depth)
        self.graphs = ForwardGraphs(tower)
        """The frozen base's passes, one launch each where they can be."""
        self._optimiser = MasterAdamW(
            list(head.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
            max_grad_norm=recipe.max_grad_norm,
        )

    def forward_backward(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Adds the gradients of a step's micro-batches (on the CPU). Returns the loss, a 0-d tensor on the device.

        The loss is the weighted mean over depths of the mean over that depth's rows of the whole step.
        """
        rows = [draft_rows(batch, self.recipe.depth) for batch in batches]
        counts = [sum(r.counts()[k] for r in rows) for k in range(self.recipe.depth)]
        scales = [w / n if n else 0.0 for w, n in zip(self.weights, counts, strict=True)]
        device = self.tower.device
        total = torch.zeros((), dtype=torch.promote_types(self.tower.dtype, torch.float32), device=device)
        loss_of = draft_losses if self.recipe.lm_head_opt else plain_losses
        for batch_cpu, pairs in zip(batches, rows, strict=True):
            if not len(pairs.judges):
                continue
            batch = batch_cpu.to(device)
            graph = self.graphs.find(batch)
            with torch.no_grad():
                # a graph's hidden states last until its next pass; the backward below is done by then
                hidden = self.tower(batch) if graph is None else graph.forward(batch)
            drafts = self.head(batch, hidden, self.tower.embed_tokens, self.tower.inv_freq, self.recipe.depth)
            loss = loss_of(drafts, hidden, self.tower.head_weight, pairs.to(device), self.recipe.loss, scales)
            loss.backward()
            total += loss.detach()
        return total

    def step(self, batches: Sequence[MicroBatch], learning_rate: float) -> torch.Tensor:
        """One optimiser step; returns its loss (0-d, on the device). A step without pairs changes nothing."""
        loss = self.forward_backward(batches)
        if any(gradient is not None for _, gradient in self.named_gradients()):
            self._optimiser.step(learning_rate)
        return loss

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yields (parameter name, gradient since the last step or None)."""
        return self._optimiser.named_gradients()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns masters and moments: all that a resume needs."""
        return self._optimiser.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores `state()` exactly. Raises ValueError naming what does not fit."""
        self._optimiser.load_state(state)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the 15 tensors by checkpoint name, rounded once from the masters to bfloat16, on the CPU.

        Servers keep the head in bfloat16 whatever the rest is stored in.
        """
        masters = self.head.tensors(self._optimiser.masters())
        return {name: t.to("cpu", torch.bfloat16).contiguous() for name, t in masters.items()}
