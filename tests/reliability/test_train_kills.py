"""train.py as a real process, killed and stopped at moments drawn by a seed, and resumed.

On a CPU it ends with the same bits, on a CUDA GPU with the same losses within one rounding of bfloat16.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparktune.lab.shapes import make_model
from sparktune.setup.demo import write_smoke
from sparktune.setup.demo_model import make_model as make_tiny

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
BF16_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run, and what starts the same one under another name."""

    folder: Path
    device: str

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Starts a run, or goes on with it."""
        train: tuple[str, ...] = ("--resume-from-checkpoint", f"results/{name}")
        if not (self.folder / "results" / name).exists():
            train = (
                "--model", "model", "--train-data", "train.jsonl", "--device", self.device, "--engine", "native",
                "--mode", "lora", "--lora-r", "8", "--learning-rate", "1e-3", "--max-steps", str(STEPS),
                "--pack-length", "256", "--gradient-accumulation", "2", "--save-steps", "7", "--eval-steps", "20",
                "--no-tensorboard", "--results", "results", "--output", "output", "--name", name,
            )
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", str(ROOT / "train.py"), *train], cwd=self.folder, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / "results" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "every step once"
        return [row["loss"] for row in rows]


@pytest.fixture(scope="module", params=[
    pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu),
])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("kills")
    if request.param == "cpu":
        make_tiny(folder / "model")
    else:
        make_tiny(folder / "tiny")
        make_model(folder / "model", "tiny")  # Qwen3.5's head dims: the fused kernels take them
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(folder / "tiny" / file, folder / "model" / file)
    write_smoke(folder / "train.jsonl")
    run = Whole(folder, request.param)
    assert run.start("whole").wait(timeout=600) == 0, run.said("whole")
    assert len(run.losses("whole")) == STEPS
    return run


def wait_for(
    process: subprocess.Popen[bytes], reached: Callable[[], bool], said: Callable[[], str], every_s: float = 0.02
) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, said()
        assert time.monotonic() < deadline, said()
        time.sleep(every_s)


def stop_in_a_save(process: subprocess.Popen[bytes], root: Path, said: Callable[[], str]) -> None:
    """Leaves the process frozen while a checkpoint's folder has not got its name yet."""
    def half_written() -> bool:
        return any(root.glob(".checkpoint-*.partial"))

    while True:
        wait_for(process, half_written, said, every_s=0.002)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if half_written():
            return
        process.send_signal(signal.SIGCONT)  # the rename was quicker: another save will come


def reaches(root: Path, step: int) -> bool:
    metrics = root / "metrics.jsonl"
    return metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("how", "code"), [
    ("kill -9 in a step", -signal.SIGKILL), ("kill -9 while a checkpoint is written", -signal.SIGKILL),
    ("SIGTERM", 75), ("SIGINT", 75), ("SIGINT twice", None),
])
def test_a_run_that_was_interrupted_ends_as_the_uninterrupted_one(whole: Whole, how: str, code: int | None) -> None:
    name = how.replace(" ", "-")
    root, drawn = whole.folder / "results" / name, random.Random(how)
    process = whole.start(name)
    if how.endswith("written"):
        stop_in_a_save(process, root, lambda: whole.said(name))
    else:
        step = drawn.randint(8, STEPS - 10)
        wait_for(process, lambda: reaches(root, step), lambda: whole.said(name))
        time.sleep(drawn.random() * 0.05)
    process.send_signal(signal.SIGKILL if how.startswith("kill") else signal.Signals[how.split()[0]])
    if how.endswith("twice"):
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    ended = process.wait(timeout=120)
    assert any(root.glob(".checkpoint-*.partial")) or not how.endswith("written")
    assert ended == code or (code is None and ended != 0), whole.said(name)
    assert len(whole.losses(name)) < STEPS, "it came too late"
    assert all((path / "manifest.json").is_file() for path in root.glob("checkpoint-*"))

    assert whole.start(name).wait(timeout=600) == 0, whole.said(name)
    assert not list(root.glob(".checkpoint-*.partial"))
    expected, found = whole.losses("whole"), whole.losses(name)
    largest = max(abs(a - b) / a for a, b in zip(expected, found, strict=True))
    print(f"{how} on {whole.device}: largest relative difference of a loss {largest:.2e}")
    if whole.device == "cpu":
        ends = [(whole.folder / "results" / n / "adapter" / "adapter_model.safetensors") for n in ("whole", name)]
        assert ends[0].read_bytes() == ends[1].read_bytes()
        assert largest == 0
    else:
        assert largest <= BF16_ROUNDING
        assert torch.cuda.is_available()
