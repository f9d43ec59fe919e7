"""A long run in one process: do memory, open files and step time stay where they were?

    python -m sparktune.lab.soak --steps 20000 --out docs/results/reliability.csv

The demo's tiny model (Qwen3.5 of four layers) learns LoRA on the demo's rows through train.py's own session, with
evaluations, samples and checkpoints twenty times a run. The first tenth of the run, which fills caches, does not count.
The rest is cut into blocks; a straight line through the blocks' figures has a slope, and the blocks' scatter around it
gives the slope's standard error. Flat is what grows by less than three of those, or by less than the limits below.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from sparktune.lab.reliability import reliability_row
from sparktune.lab.table import append_rows
from sparktune.setup.demo import make_model, write_smoke
from sparktune.training.loop import TrainingLoop
from sparktune.training.session import run_session

__all__ = ["Trend", "main", "soak", "trend"]

_BLOCKS = 20
_WARM_UP = 0.1
_LIMITS = {"memory": 0.01, "open files": 0.0, "step time": 0.05}
"""Growth over the whole run, as a share, that still counts as flat where it is more than noise."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A straight line through a figure over the steps."""

    name: str
    unit: str
    mean: float
    slope: float
    """Of the unit, for 1,000 steps."""
    error: float
    """Standard error of the slope."""
    growth: float
    """Over the steps that counted, as a share of the mean."""

    @property
    def flat(self) -> bool:
        """Whether it stays."""
        return self.slope <= 3 * self.error or self.growth <= _LIMITS[self.name]

    def line(self) -> str:
        """Returns it in words."""
        said = "flat" if self.flat else "NOT FLAT"
        return (f"{self.name}: {self.mean:.4g} {self.unit}, slope {self.slope:+.3g} +- {self.error:.2g} {self.unit} a "
                f"thousand steps ({self.growth:+.2%} over the run): {said}")


def trend(name: str, unit: str, figures: Sequence[float], *, steps_a_figure: int) -> Trend:
    """Fits a line to figures taken at equal distances, the first tenth of them left out.

    Args:
        name: memory, open files or step time.
        unit: of a figure.
        figures: one every `steps_a_figure` steps, at least 40.
        steps_a_figure: see there.
    """
    counted = np.asarray(figures[math.ceil(len(figures) * _WARM_UP):], dtype=np.float64)
    blocks = np.array_split(counted, _BLOCKS)
    y = np.array([np.median(block) for block in blocks])  # a block's few slow steps are the machine's
    length = len(counted) * steps_a_figure / 1000
    x = (np.arange(_BLOCKS) + 0.5) * length / _BLOCKS
    away = x - x.mean()
    slope = float((away * y).sum() / (away**2).sum())
    scatter = y - y.mean() - slope * away
    error = math.sqrt(float((scatter**2).sum()) / (_BLOCKS - 2) / float((away**2).sum()))
    mean = float(y.mean())
    return Trend(name=name, unit=unit, mean=mean, slope=slope, error=error, growth=slope * length / mean)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(folder: Path, steps: int) -> list[Trend]:
    """Trains `steps` steps in this process and returns the trends of memory, open files and step time.

    Args:
        folder: to work in; the run and its model are made there.
        steps: at least 400.

    Raises:
        RuntimeError: the run failed.
    """
    if steps < 400:
        raise ValueError(f"a soak of {steps} steps shows nothing; give 400 or more")
    make_model(folder / "tiny", vocab_size=512, dtype="float32")
    write_smoke(folder / "rows.jsonl")
    every = max(1, steps // 1000)
    seconds: list[float] = []
    memory: list[float] = []
    handles: list[float] = []
    step = TrainingLoop.step

    def watched(loop: TrainingLoop) -> None:
        began = time.perf_counter()
        step(loop)
        seconds.append(time.perf_counter() - began)
        if loop.state.step % every == 0:
            memory.append(_resident_mib())
            handles.append(float(len(os.listdir("/proc/self/fd"))))

    often = max(1, steps // 20)
    flags = {
        "model": str(folder / "tiny"), "data": folder / "rows.jsonl", "results": folder / "results", "name": "soak",
        "mode": "lora", "engine": "native", "device": "cpu", "lora_r": 2, "max_steps": steps, "pack_length": 64,
        "max_seq_length": 64, "gradient_accumulation": 1, "learning_rate": 1e-4, "save_steps": often,
        "eval_steps": often, "bad_row_limit": 1.0, "loss_spike": 0.0,
    }
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.set_num_threads(1)
    with mock.patch.object(TrainingLoop, "step", watched):
        code = run_session(flags, None, {})
    if code:
        raise RuntimeError(f"the run failed with {code}")
    a_figure = [1000 * statistics.median(seconds[i : i + every]) for i in range(0, len(seconds) - every + 1, every)]
    return [
        trend("memory", "MiB", memory, steps_a_figure=every),
        trend("open files", "handles", handles, steps_a_figure=every),
        trend("step time", "ms", a_figure, steps_a_figure=every),
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the soak. Returns 0 when everything was flat, else 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m sparktune.lab.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="append a row to this CSV")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sparktune-soak-") as folder:
        found = soak(Path(folder), args.steps)
    print(*(one.line() for one in found), sep="\n")
    if args.out is not None:
        append_rows(args.out, [reliability_row(
            "soak", "sparktune.lab.soak", arguments, trials=args.steps, failures=sum(not one.flat for one in found),
            seconds=time.monotonic() - began, found="; ".join(one.line() for one in found),
        )])
    return 0 if all(one.flat for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
