"""A rehearsal's prediction against the very run it stands for: on a clock that only work moves, they must agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.training import rehearsal
from sparktune.training.batch import MicroBatch
from sparktune.training.checkpoint import LoopState
from sparktune.training.dealing import StepCost
from sparktune.training.loop import SamplePrompt, TrainingLoop
from sparktune.training.metrics import MetricsLog
from sparktune.training.narrator import Narrator
from sparktune.training.packing import PackPlan
from sparktune.training.rehearsal import rehearse
from sparktune.training.schedule import run_length
from sparktune.training.stop import StopRequest

SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-0.8B"], "Qwen/Qwen3.5-0.8B")
SHARE = 0.5


class Clock:
    """Seconds that pass only when an engine works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, device: torch.device) -> float:
        return self.now


class PacedEngine:
    """Takes time in proportion to the arithmetic of its documents; the first three steps compile."""

    device = torch.device("cpu")

    def __init__(self, clock: Clock, cost: StepCost, jitter: float = 0.0) -> None:
        self.clock, self.cost, self.jitter = clock, cost, np.random.default_rng(0).normal(0, jitter, 10_000)
        self.steps = 0

    def _work(self, batch: MicroBatch) -> float:
        lengths = np.diff(batch.cu_seqlens.numpy()).astype(np.int64)
        return self.cost(int(lengths.sum()), int((lengths**2).sum())) * 1e-12

    def forward_backward(self, micro_batches: Iterable[MicroBatch], n_supervised: int) -> torch.Tensor:
        for batch in micro_batches:
            self.clock.now += self._work(batch) * (1 + self.jitter[self.steps])
        self.clock.now += 5.0 if self.steps < 3 else 0.0
        self.steps += 1
        return torch.ones(())

    def named_gradients(self) -> list[tuple[str, torch.Tensor]]:
        return [("w", torch.ones(1))]

    def gradient_norm(self) -> torch.Tensor:
        return torch.ones(())

    def optimiser_step(self, learning_rate: float) -> torch.Tensor:
        return torch.ones(())

    def drop_gradients(self) -> None:
        pass

    def recompute_more(self) -> str | None:
        return None

    def loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        self.clock.now += self._work(micro_batch) / 3
        return torch.ones(())

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        self.clock.now += 0.5
        return [1] * max_new_tokens

    def state(self) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(1)}

    def export(self, folder: Path) -> None:
        self.clock.now += 0.25
        folder.mkdir()


def _dataset(count: int, seed: int) -> TokenDataset:
    lengths = np.random.default_rng(seed).integers(8, 400, count)
    total = int(lengths.sum())
    return TokenDataset(
        np.ones(total, dtype=np.uint32), np.ones(total, dtype=np.uint8),
        np.concatenate(([0], np.cumsum(lengths))).astype(np.int64), np.arange(count), f"key{seed}",
    )


def _loop(root: Path, clock: Clock, jitter: float = 0.0, **values: Any) -> TrainingLoop:
    plan = Plan.model_validate({
        "mode": "lora", "lora_r": 8, "num_epochs": 3.0, "gradient_accumulation": 2, "learning_rate": 1e-4,
        "data": "rows.jsonl", "pack_length": 512, "tensorboard": False, **values,
    })
    run = RunDir(name="toy", results_root=root, output_root=root)
    run.root.mkdir(parents=True)
    train = PackPlan(_dataset(200, 1), pack=True, pack_length=512, seed=3)
    state = LoopState()
    return TrainingLoop(
        engine=PacedEngine(clock, StepCost.of(plan, SPEC, SHARE), jitter), plan=plan, run=run,
        length=run_length(len(train), 2, plan.num_epochs, plan.max_steps), train=train,
        evaluation=PackPlan(_dataset(30, 2), pack=True, pack_length=512, shuffle=False),
        prompts=[SamplePrompt(text="x", ids=(1,))], decode=str, stop_ids=(),
        log=MetricsLog(run, state, NullEvents(), tensorboard=False, say=str), state=state, stop=StopRequest(), say=str,
        show=str,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(rehearsal, "_synchronised", found)
    return found


def _both(tmp_path: Path, clock: Clock, jitter: float, steps: int = 15) -> tuple[Any, float]:
    loop = _loop(tmp_path / "a", clock, jitter)
    predicted = rehearse(loop, SPEC, SHARE, steps, 0.0, StopRequest(), Narrator(), loop.export)
    clock.now = 0.0
    _loop(tmp_path / "b", clock, jitter).run_to_end()
    return predicted, clock.now


def test_without_noise_the_prediction_is_the_run(tmp_path: Path, clock: Clock) -> None:
    predicted, true_s = _both(tmp_path, clock, 0.0)
    assert predicted.train_s == pytest.approx(true_s, rel=1e-3)
    assert predicted.steps == 15


def test_with_noisy_steps_it_is_within_five_percent_and_inside_its_range(tmp_path: Path, clock: Clock) -> None:
    predicted, true_s = _both(tmp_path, clock, 0.05)
    assert predicted.train_s == pytest.approx(true_s, rel=0.05)
    assert predicted.low_s <= true_s <= predicted.high_s


def test_steps_of_unequal_size_count_for_their_arithmetic(tmp_path: Path, clock: Clock) -> None:
    """A mean over the timed steps alone would be off by more: that is what the arithmetic is for."""
    loop = _loop(tmp_path / "a", clock)
    seconds = []
    for _ in range(5):
        before = clock.now
        loop.step()
        seconds.append(clock.now - before)
    plain = sum(seconds[3:]) / 2 * loop.length.total_steps
    clock.now = 0.0
    predicted, true_s = _both(tmp_path / "c", clock, 0.0, steps=2)
    assert abs(predicted.train_s - true_s) < abs(plain - true_s)


def test_a_run_too_short_to_time_says_so(tmp_path: Path, clock: Clock) -> None:
    loop = _loop(tmp_path / "a", clock, max_steps=1)
    with pytest.raises(SparktuneError, match="too few to time"):
        rehearse(loop, SPEC, SHARE, 15, 0.0, StopRequest(), Narrator(), loop.export)


def test_a_signal_ends_it_between_two_steps(tmp_path: Path, clock: Clock) -> None:
    stop = StopRequest()
    stop.requested = True
    loop = _loop(tmp_path / "a", clock)
    with pytest.raises(KeyboardInterrupt):
        rehearse(loop, SPEC, SHARE, 15, 0.0, stop, Narrator(), loop.export)


def test_what_is_written_can_be_read(tmp_path: Path, clock: Clock) -> None:
    loop = _loop(tmp_path / "a", clock)
    predicted = rehearse(loop, SPEC, SHARE, 5, 0.0, StopRequest(), Narrator(), loop.export)
    row = json.loads(predicted.model_dump_json())
    assert row["low_s"] < row["train_s"] < row["high_s"]
