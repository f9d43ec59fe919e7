"""Killed, stopped, resumed: the run that was interrupted ends bit for bit where the other one ends."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparktune.setup.demo import make_model
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.flags import add_plan_flags, given_flags
from sparktune.setup.plan.outfolder import size_of
from sparktune.training import session as training_session
from sparktune.training.checkpoint import checkpoints_of, validate
from sparktune.training.loop import TrainingLoop
from sparktune.training.session import run_session
from sparktune.training.tower import TextTower

pytestmark = pytest.mark.xdist_group("train-processes")

Train = Callable[..., "subprocess.Popen[str]"]
Session = Callable[..., tuple[int, str, str]]
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


@pytest.fixture
def session(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Session]:
    """Runs one training session in this process; returns its exit code and what it printed on both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)  # as the processes have

    def run(*args: str) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--config", type=Path)
        add_plan_flags(parser, "train")
        parsed = parser.parse_args(args)
        code = int(run_session(given_flags(parsed), parsed.config, {}))
        return code, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


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


def in_time(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Sends SIGTERM; the checkpoint must be there, and the process gone, ten seconds after the time it foretells."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    took = time.monotonic() - began
    assert process.returncode == 75, err
    told = re.findall(r"^Stopping.*: writing a checkpoint of ([\d.]+) ([GM])B, about (\d+) s \((.*)\)\.$", out,
                      re.MULTILINE)
    saved = re.findall(r"^step \d+: saved (checkpoint-\d+)$", out, re.MULTILINE)
    assert len(told) == 1 or re.search(rf"resume-from-checkpoint \S+/{saved[-1]}$", err), out
    if told:
        assert took < int(told[0][2]) + 10.0, (told, took)
        size, unit = float(told[0][0]), {"G": 1e9, "M": 1e6}[told[0][1]]
        newest = re.search(r"--resume-from-checkpoint (\S+)", err)
        assert newest
        assert size * unit == pytest.approx(size_of(Path(newest[1])), rel=0.05)
        assert ("guess" in told[0][3]) == (len(saved) == 1)
    return out, err


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
    start_train: Train, session: Session, flags: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    assert session(*flags, "--name", "whole")[0] == 0
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
    out, err = in_time(stopped)
    assert "Go on with: python train.py --resume-from-checkpoint" in err
    assert session("--config", str(results / "stopped" / "plan.yaml"))[0] == 0
    assert_same_end(results / "whole", results / "stopped")


def test_full_fine_tuning_resumes_exactly(
    start_train: Train, session: Session, flags: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    full = [*flags, "--mode", "full", "--lora-dropout", "0", "--learning-rate", "1e-4", "--max-steps", "6"]
    assert session(*full, "--name", "whole")[0] == 0
    killed = start_train(*full, "--name", "killed")
    wait_for_step(results / "killed", 4, killed)
    killed.kill()
    killed.communicate()
    assert session("--resume-from-checkpoint", str(results / "killed"))[0] == 0
    assert_same_end(results / "whole", results / "killed")


@pytest.mark.parametrize("patience", [None, 1])
def test_a_run_that_is_trained_is_finished_where_its_training_would_not_fit(
    patience: int | None, session: Session, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `./run.sh resume` does with what torchrun trained on more GPUs than there are here: its stage is over."""
    run = tmp_path / "results" / "run"
    full = [*flags, "--mode", "full", "--lora-dropout", "0", "--learning-rate", "1e-4", "--max-steps", "6"]
    if patience is not None:  # ends at the second evaluation, and gives the one at step 0 back
        full += ["--learning-rate", "1", "--eval-steps", "2", "--save-steps", "2", "--early-stopping", str(patience)]
    assert session(*full, "--name", "run")[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix in
              (".jsonl", ".safetensors", ".yaml")}
    small = training_session.measure_machine(torch.device("cpu")).model_copy(update={"memory_gib": 0.01})

    def stage() -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(training_session, "measure_machine", lambda device: small)
            return session("--config", str(run / "plan.yaml"))

    code, out, err = stage()
    assert code == 0, err
    assert re.search(rf"Trained before: {run / 'weights'}, as checkpoint-\d has it", out)
    assert {path: path.read_bytes() for path in before} == before
    ends = [json.loads(line) for line in (run / "stages" / "train.ndjson").read_text().splitlines()][-1]
    assert (ends["kind"], ends["ok"]) == ("end", True)

    # another result than the checkpoint's, or none: it is made anew, for which the model is needed
    (trained,) = (run / "weights").glob("*.safetensors")
    trained.write_bytes(trained.read_bytes()[:-1] + b"!")
    code, _, err = stage()
    assert code == 5
    assert "GiB is there" in err
    assert session("--config", str(run / "plan.yaml"))[0] == 0
    assert trained.read_bytes() == before[trained]
    newest = checkpoints_of(run)[0]
    newest.rename(newest.with_name(f"{newest.name}.away"))
    assert stage()[0] == 5, "there are steps to be made"


def test_what_a_resume_refuses_and_repairs(
    session: Session, flags: list[str], tmp_path: Path
) -> None:
    """One run, then: another plan is refused by name, damage is told, the checkpoint before is taken."""
    run = tmp_path / "results" / "run"
    assert session(*flags, "--name", "run")[0] == 0
    before = metrics(run)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()

    resume = ("--resume-from-checkpoint", str(run / "checkpoint-9"))
    code, _, err = session(*resume, "--learning-rate", "1e-3", "--seed", "5")
    assert code == 1
    assert "learning_rate was 0.002 and is now 0.001; seed was 3407 and is now 5" in err
    assert metrics(run) == before  # nothing was touched

    damaged = run / "checkpoint-12" / "engine.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    code, _, err = session("--resume-from-checkpoint", str(run / "checkpoint-12"))
    assert code == 1
    assert "engine.safetensors changed after it was written" in err

    (run / "checkpoint-9" / "loop.json").write_bytes((run / "checkpoint-9" / "loop.json").read_bytes()[:-3])
    code, out, err = session("--config", str(run / "plan.yaml"))
    assert code == 0, err
    assert "checkpoint-12.damaged" in out
    assert "checkpoint-9.damaged" in out
    assert "Resuming from checkpoint-6" in out
    assert metrics(run) == before
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter

    # an explicit earlier checkpoint: the later ones step aside, the steps run again and come out the same
    code, out, err = session("--resume-from-checkpoint", str(run / "checkpoint-6"))
    assert code == 0, err
    assert "checkpoint-9.superseded" in out
    assert metrics(run) == before
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_second_signal_aborts(
    session: Session, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TrainingLoop.step

    def step(loop: TrainingLoop) -> None:
        if loop.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        whole(loop)

    monkeypatch.setattr(TrainingLoop, "step", step)
    code, _, err = session(*flags, "--name", "aborted")
    assert code == 130, err
    assert "Aborted" in err
    assert [p.name for p in checkpoints_of(tmp_path / "results" / "aborted")] == ["checkpoint-3"]


def test_memory_that_runs_out_costs_nothing(
    session: Session, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a step an allocation fails; between two steps something else on the machine takes what was free."""
    results, flags = tmp_path / "results", [*flags, "--max-steps", "6", "--eval-split", "0"]
    assert session(*flags, "--name", "whole")[0] == 0

    head_loss, refused = TextTower.head_loss, list[str]()

    def short(tower: TextTower, *args: Any) -> torch.Tensor:
        loss = head_loss(tower, *args)
        if tower.dropout_calls == 8 and not refused:  # the second micro-batch of step 4
            refused.append(tower.recompute)
            torch.empty(2**50, dtype=torch.float64)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(TextTower, "head_loss", short)
        code, out, err = session(*flags, "--name", "full")
    assert code == 0, err
    assert refused == ["none"]
    assert re.search(r"Warning: out of memory at step 4 with recompute none \(.*(can't|not enough|Cannot).*\)\. The "
                     r"step is done again, once, with recompute norms", out), out
    assert load_plan(results / "full" / "plan.yaml").recompute == "norms"
    losses = [[row["loss"] for row in metrics(results / name)] for name in ("whole", "full")]
    assert losses[1][:4] == losses[0][:4]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # what is computed again adds gradients in another order

    def free_gib() -> float:
        rows = results / "short" / "metrics.jsonl"
        return 0.1 if rows.exists() and '"step": 2,' in rows.read_text() else 8.0

    slow = TrainingLoop.step

    def step(loop: TrainingLoop) -> None:
        slow(loop)
        time.sleep(0.1)  # so that the watchdog, which looks five times a second, finds the run at work

    with monkeypatch.context() as patch:
        patch.setattr(training_session, "host_available_gib", free_gib)
        patch.setattr(TrainingLoop, "step", step)
        code, _, err = session(*flags, "--name", "short")
    assert code == 75, err
    stopped = re.search(r"Stopped after step ([2-5]) of 6, because only 0\.10 GiB of memory is free and the ", err)
    assert stopped, err
    assert checkpoints_of(results / "short")[0].name == f"checkpoint-{stopped[1]}"
    assert session("--resume-from-checkpoint", str(results / "short"))[0] == 0
    assert_same_end(results / "whole", results / "short")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_larger_model_stops_within_the_time_it_foretells_and_ten_seconds(
    start_train: Train, smoke: Path, tmp_path: Path
) -> None:
    """72.5 M parameters, all of them trained: a checkpoint has 1.16 GB. Needs 3 GB of memory, 4 GB of disk."""
    make_model(tmp_path / "larger", hidden=1024, layers=5, dtype="float32")
    process = start_train(
        "--mode", "full", "--engine", "native", "--model", tmp_path / "larger", "--train-data", smoke,
        "--eval-split", "0", "--max-steps", "40", "--pack-length", "128", "--gradient-accumulation", "2",
        "--learning-rate", "1e-4", "--save-steps", "2", "--keep-checkpoints", "1", "--no-tensorboard",
        "--name", "larger",
    )
    wait_for_step(tmp_path / "results" / "larger", 3, process)
    out, _ = in_time(process)
    said = re.search(r"writing a checkpoint of 1\.1\d GB, about \d+ s \([\d.]+ MB a second, as the one before\)", out)
    assert said, out
    print(said[0])
    validate(checkpoints_of(tmp_path / "results" / "larger")[0])
