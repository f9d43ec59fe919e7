"""The verification bench: its command, its check, and the three rows' agreement on a small model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sparktune.lab.training_loop.qwen_minimal_bench import QWEN_28, Agreement, Shape, compare, make_dense, parse

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=300)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab.training_loop.qwen_minimal_bench", *args], capture_output=True, text=True,
        cwd=ROOT, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_the_published_command_works_from_the_root() -> None:
    for mode in ("lora", "full-bf16"):
        done = run("--mode", mode)
        assert done.returncode == 3
        assert "CUDA GPU" in done.stderr
        assert "Traceback" not in done.stderr


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['x', '--help']; "
        "runpy.run_module('lab.training_loop.qwen_minimal_bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Baseline v0" in done.stdout


def test_the_shape_is_the_published_one() -> None:
    assert QWEN_28.layers == 28
    assert parse(["--mode", "lora"]).tokens == 5120
    with pytest.raises(SystemExit):
        parse(["--mode", "lora", "--rows", "path-c"])


@pytest.mark.parametrize("full", [False, True])
def test_path_b_agrees_with_transformers(tmp_path: Path, full: bool) -> None:
    folder = make_dense(tmp_path / "dense", SMALL, "cpu")
    found = compare(folder, SMALL, full=full, rank=4, dtype="float32", device="cpu", tokens=40)
    assert found.complaint() == ""
    assert found.loss == pytest.approx(found.true_loss, rel=1e-5)
    assert found.norm == pytest.approx(found.true_norm, rel=1e-3)


def test_the_check_can_be_red() -> None:
    good = Agreement(loss=5.0, peer_loss=5.001, true_loss=5.0005, norm=1.0, peer_norm=1.01, true_norm=1.0)
    assert good.complaint() == ""
    assert "loss" in replace(good, loss=5.01).complaint()
    assert "norm" in replace(good, norm=1.2).complaint()
    assert replace(good, norm=float("nan")).complaint()
    assert replace(good, loss=float("nan")).complaint()
