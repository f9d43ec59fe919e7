"""A sample of lab/kill_matrix.py: whole runs killed, resumed, and compared with the uninterrupted one bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparktune.lab.kill_matrix import draw
from sparktune.lab.kill_trial import INTERRUPTIONS, STAGES_KILLED, differing_files

ROOT = Path(__file__).resolve().parents[2]


def test_a_drawing_covers_every_stage_with_every_interruption_and_is_its_seeds() -> None:
    trials = draw(200, 1)
    assert {(t.stage, t.how) for t in trials} == {(s, how) for s in STAGES_KILLED for how in INTERRUPTIONS}
    assert trials == draw(200, 1) != draw(200, 2)
    assert [t.number for t in trials] == list(range(200))
    assert all(0.0 <= t.moment < 1.0 for t in trials)


def matrix(folder: Path, *words: str) -> str:
    """Runs the matrix as a process: what it forks must not come from a test's process."""
    command = [sys.executable, "-P", "-m", "sparktune.lab.kill_matrix", "--work", str(folder), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_a_stop_s_own_checkpoint_may_take_the_oldest_one_s_place_and_nothing_else_may_differ() -> None:
    expected = {f"results/one/checkpoint-{step}/engine.safetensors": f"bits of {step}" for step in (4, 6)}
    expected["results/one/adapter/adapter_model.safetensors"] = "bits"
    stopped_at_5 = {**expected, "results/one/checkpoint-5/engine.safetensors": "bits of 5"}
    del stopped_at_5["results/one/checkpoint-4/engine.safetensors"]
    assert differing_files(expected, expected) == []
    assert differing_files(stopped_at_5, expected) == []
    for wrong in (
        {**expected, "results/one/checkpoint-4/engine.safetensors": "other bits"},
        {**stopped_at_5, "results/one/checkpoint-6/engine.safetensors": "other bits"},
        {**stopped_at_5, "results/one/adapter/adapter_model.safetensors": "other bits"},
        {**expected, "results/one/checkpoint-5/engine.safetensors": "one too many"},
    ):
        assert len(differing_files(wrong, expected)) == 1
    lost = {path: bits for path, bits in expected.items() if "checkpoint-6" not in path}
    assert differing_files(lost, expected) == ["results/one/checkpoint-6/engine.safetensors"]


@pytest.mark.timeout(900)
def test_killed_runs_end_with_the_bits_of_the_uninterrupted_one(tmp_path: Path) -> None:
    said = matrix(tmp_path / "kills", "--small", "--trials", "6", "--seed", "5", "--workers", "2")
    assert re.search(r"^6 trials, 0 failed, seed 5", said, re.MULTILINE), said


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills_of_the_whole_journey(tmp_path: Path) -> None:
    said = matrix(tmp_path / "kills", "--trials", "200", "--seed", "1", "--by-exec")
    assert "A run of real processes gives the same bits" in said
    assert re.search(r"^200 trials, 0 failed", said, re.MULTILINE), said
