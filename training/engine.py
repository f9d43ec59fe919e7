"""What an engine is. For every one, loop.py owns data order, accumulation, schedule, logs, evaluation, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from sparktune.training.batch import MicroBatch

__all__ = ["Engine"]


class Engine(Protocol):
    """One model on one device, trainable."""

    device: torch.device

    def forward_backward(self, micro_batches: Iterable[MicroBatch], n_supervised: int) -> torch.Tensor:
        """Adds the gradients of sum(cross-entropy) / n_supervised over the micro-batches, taken one by one.

        Returns this rank's share of the loss, a 0-d tensor on the device (reading it is the caller's synchronisation).
        `n_supervised` counts the targets of the whole step, over all micro-batches and ranks. Called once a step: with
        several ranks the gradients are those of all of them when it returns.
        """

    def gradient_norm(self) -> torch.Tensor:
        """Returns the global norm of the gradients as they stand (0-d tensor)."""

    def optimiser_step(self, learning_rate: float) -> torch.Tensor:
        """Clips, steps and zeroes the gradients. Returns the gradient norm before clipping (0-d tensor)."""

    def drop_gradients(self) -> None:
        """Forgets every pass since the last optimiser step: its gradients, and the dropout masks it drew."""

    def recompute_more(self) -> str | None:
        """After an allocation failed: forgets the passes as above, and keeps less of the next ones.

        Returns what is computed again from now on, in a word, or None when there is nothing left to give up.
        """

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yields every trainable tensor's name and its gradient since the last step, None where there is none."""

    def loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Returns sum(cross-entropy) of one micro-batch without gradients, dropout off."""

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """Returns the greedy continuation, the stop token included if met."""

    def state(self) -> dict[str, torch.Tensor]:
        """Returns everything a resume needs beyond the loop's own counters: masters, moments, generators.

        Flat names, tensors on the CPU or the device, safetensors dtypes; views allowed.
        """

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores `state()` exactly. Raises ValueError naming missing, unexpected or misshapen entries."""

    def lend(self) -> None:
        """On a rank that writes nothing: takes part in what rank 0 needs to write `state()`."""

    def export(self, folder: Path | None) -> None:
        """Makes `folder` with the trained result in it: an adapter in PEFT's format, or the trained tensors.

        None, on a rank that writes nothing: takes part in what rank 0 needs to write it.
        """
