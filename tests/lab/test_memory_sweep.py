"""The memory sweep's pure parts: its plans, its verdict, and what it says without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparktune.lab.memory_sweep import SMALL, SWEEP, lengths_of, plan_of, verdict

ROOT = Path(__file__).resolve().parents[2]


def test_the_sweep_covers_what_was_promised() -> None:
    judged = [t for t in SWEEP if not t.graphs]
    assert len(judged) >= 14
    assert {t.size for t in judged} == {"0.8B", "2B", "4B", "9B"}
    assert {t.storage for t in judged} == {"none", "nf4", "int8"}
    assert {t.optimizer for t in judged} == {"adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"}
    assert {t.recompute for t in judged} == {"none", "norms", "layer", "all"}
    assert {t.mode for t in judged} == {"lora", "full"}
    assert min(t.tokens for t in judged) == 1024
    assert max(t.tokens for t in judged) == 16384
    assert len({t.name for t in SWEEP}) == len(SWEEP)
    assert SMALL


@pytest.mark.parametrize("trial", SWEEP, ids=lambda t: t.name)
def test_documents_fill_the_row(trial) -> None:
    lengths = lengths_of(trial)
    assert sum(lengths) == trial.tokens
    assert len(lengths) == trial.documents
    assert plan_of(trial, Path("model")).recompute == trial.recompute


def test_a_verdict_is_harder_on_too_little() -> None:
    assert verdict(10.69, 10.0) == (pytest.approx(0.069), True)
    assert not verdict(10.71, 10.0)[1]
    assert verdict(9.71, 10.0)[1]
    assert not verdict(9.69, 10.0)[1]


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "lab.memory_sweep"], capture_output=True, text=True, cwd=ROOT,
                          check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 3
    assert "CUDA GPU" in done.stderr
