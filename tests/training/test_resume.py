"""Killed, stopped, resumed: the run that was interrupted ends bit for bit where the other one ends."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sparktune.training.checkpoint import checkpoints_of

pytestmark = pytest.mark.xdist_group("train-processes")

Train = Callable[..., "subprocess.Popen[str]"]
STEPS = 12


@pytest.fixture
def flags(tiny_model: Path, smoke: Path) -> list[str]:
    """LoRA with dropout on packs; three checkpoints, an evaluation every four steps."""
    return [
        "--mode", "lora", "--engine", "native", "--model", str(tiny_model), "--train-data", str(smoke),
        "--eval-split", "0.1", "--max-steps", str(STEPS), "--pack", "--pack-length", "128",
        "--gradient-accumulation", "2", "--lora-r", "4", "--lora-dropout", "0.2", "--learning-rate", "2e-3",
        "--save-steps", "3", "--eval-steps", "4", "--keep-checkpoints", "3", "--sample-prompt", "What is 3 + 3?",
        "--no-tensorboard", "--results", "results",
    ]


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Waits for the process and returns its standard output."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tok_per_s", "peak_gib")} for row in rows]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns when metrics.jsonl shows `step`."""
    deadline = time.monotonic() + 200
    path = run / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was never reached")


def assert_same_end(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    result = "adapter" if (one / "adapter").exists() else "weights"
    files = sorted(p.name for p in (one / result).glob("*.safetensors"))
    assert files
    assert files == sorted(p.name for p in (other / result).glob("*.safetensors"))
    for name in files:
        assert (one / result / name).read_bytes() == (other / result / name).read_bytes(), name


def test_killed_and_stopped_runs_end_where_the_uninterrupted_one_does(
    start_train: Train, flags: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    finish(start_train(*flags, "--name", "whole"))
    assert [r["step"] for r in metrics(results / "whole") if "loss" in r] == list(range(1, STEPS + 1))
    b = [t for n, t in load_file(results / "whole" / "adapter" / "adapter_model.safetensors").items() if "lora_B" in n]
    assert all(t.abs().max() > 0 for t in b)

    # kill -9 at a random step, past the first checkpoint, at a random moment within it
    chance = random.Random(20260131)
    killed = start_train(*flags, "--name", "killed")
    wait_for_step(results / "killed", chance.randint(4, STEPS - 2), killed)
    time.sleep(chance.random() * 0.05)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (results / "killed" / "adapter").exists()
    newest = checkpoints_of(results / "killed")[0]
    out = finish(start_train("--resume-from-checkpoint", newest))
    assert f"Resuming from {newest.name}" in out
    assert_same_end(results / "whole", results / "killed")

    # SIGTERM: a checkpoint at once and exit 75; then through the run's own plan.yaml, as the pipeline does
    stopped = start_train(*flags, "--name", "stopped")
    wait_for_step(results / "stopped", chance.randint(1, STEPS - 2), stopped)
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, err
    assert "Go on with: python train.py --resume-from-checkpoint" in err
    finish(start_train("--config", results / "stopped" / "plan.yaml"))
    assert_same_end(results / "whole", results / "stopped")


def test_full_fine_tuning_resumes_exactly(start_train: Train, flags: list[str], tmp_path: Path) -> None:
    results = tmp_path / "results"
    full = [*flags, "--mode", "full", "--lora-dropout", "0", "--learning-rate", "1e-4", "--max-steps", "6"]
    finish(start_train(*full, "--name", "whole"))
    killed = start_train(*full, "--name", "killed")
    wait_for_step(results / "killed", 4, killed)
    killed.kill()
    killed.communicate()
    finish(start_train("--resume-from-checkpoint", results / "killed"))
    assert_same_end(results / "whole", results / "killed")


def test_what_a_resume_refuses_and_repairs(start_train: Train, flags: list[str], tmp_path: Path) -> None:
    """One run, then: another plan is refused by name, damage is told, the checkpoint before is taken."""
    run = tmp_path / "results" / "run"
    finish(start_train(*flags, "--name", "run"))
    before = metrics(run)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()

    process = start_train("--resume-from-checkpoint", run / "checkpoint-9", "--learning-rate", "1e-3", "--seed", "5")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "learning_rate was 0.002 and is now 0.001; seed was 3407 and is now 5" in err

    damaged = run / "checkpoint-12" / "engine.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    process = start_train("--resume-from-checkpoint", run / "checkpoint-12")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "engine.safetensors changed after it was written" in err

    (run / "checkpoint-9" / "loop.json").write_bytes((run / "checkpoint-9" / "loop.json").read_bytes()[:-3])
    out = finish(start_train("--config", run / "plan.yaml"))
    assert "checkpoint-12.damaged" in out
    assert "checkpoint-9.damaged" in out
    assert "Resuming from checkpoint-6" in out
    assert metrics(run) == before
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
