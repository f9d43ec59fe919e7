"""What a run writes while it trains: metrics.jsonl, samples.jsonl, TensorBoard curves, events for the parent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.rundir import RunDir
from sparktune.training.checkpoint import LoopState

__all__ = ["MetricsLog", "NoMetrics"]


def _open_at(path: Path, length: int, say: Callable[[str], None]) -> BinaryIO:
    """Opens an append-only log and cuts it at `length` bytes: what came after belongs to steps that run again."""
    file = path.open("ab")
    seen = file.seek(0, os.SEEK_END)
    if seen < length:
        say(
            f"{path} has {seen} bytes, the checkpoint knew {length}: it was changed after the checkpoint was written. "
            "Training goes on exactly; the log keeps what is there."
        )
    else:
        file.truncate(length)
        file.seek(0, os.SEEK_END)
    return file


class MetricsLog:
    """The logs of one run, cut to the checkpoint's position when it resumes.

    Args:
        run: the run's paths; its root exists.
        state: the loop's state: zero lengths for a new run, a checkpoint's for a resumed one.
        events: where the parent listens.
        tensorboard: also write TensorBoard event files.
        say: takes one sentence for the user.
    """

    def __init__(
        self, run: RunDir, state: LoopState, events: EventWriter, *, tensorboard: bool, say: Callable[[str], None]
    ) -> None:
        self._metrics = _open_at(run.metrics, state.metrics_bytes, say)
        self._samples = _open_at(run.samples, state.samples_bytes, say)
        self._events = events
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here

            # A resumed step is drawn once: the board forgets what it was told after the checkpoint.
            self._board = SummaryWriter(str(run.tensorboard), purge_step=state.step + 1 if state.step else None)

    def _write(self, file: BinaryIO, row: Mapping[str, Any]) -> None:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()

    def _draw(self, row: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self._board is not None:
            for key, tag in tags.items():
                if row.get(key) is not None:
                    self._board.add_scalar(tag, row[key], row["step"])

    def step(self, row: Mapping[str, Any], total_steps: int) -> None:
        """Records one optimiser step."""
        self._write(self._metrics, row)
        self._events.emit("metric", **row)
        self._events.progress("train", row["step"], total_steps, "steps")
        self._draw(row, {
            "loss": "train/loss", "lr": "train/learning_rate", "grad_norm": "train/grad_norm",
            "tok_per_s": "speed/tok_per_s", "peak_gib": "memory/peak_gib",
        })

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Records one evaluation: step, epoch, eval_loss."""
        self._write(self._metrics, row)
        self._events.emit("metric", **row)
        self._draw(row, {"eval_loss": "eval/loss"})

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """Records one answer."""
        row = {"step": step, "prompt": prompt, "answer": answer}
        self._write(self._samples, row)
        self._events.emit("sample", **row)
        if self._board is not None:
            self._board.add_text(f"samples/{prompt[:60]}", answer, step)

    def sync(self) -> tuple[int, int]:
        """Forces both files to the disk and returns their lengths in bytes: (metrics.jsonl, samples.jsonl)."""
        lengths = []
        for file in (self._metrics, self._samples):
            os.fsync(file.fileno())
            lengths.append(os.fstat(file.fileno()).st_size)
        if self._board is not None:
            self._board.flush()
        return lengths[0], lengths[1]

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._samples.close()
        if self._board is not None:
            self._board.close()


class NoMetrics:
    """What a rank other than 0 writes."""

    def step(self, row: Mapping[str, Any], total_steps: int) -> None:
        """Nothing."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """Nothing."""

    def sync(self) -> tuple[int, int]:
        """Returns lengths that nobody reads."""
        return 0, 0

    def close(self) -> None:
        """Nothing."""
