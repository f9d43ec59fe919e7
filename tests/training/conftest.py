"""A tiny model and data shared by the tests of training, and a way to start train.py as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparktune.setup.demo import make_model, write_smoke

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5 of four layers (linear, linear, linear, full), float32, with a tokenizer of 512 tokens."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny", vocab_size=512, dtype="float32")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty chat rows."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_smoke(path)
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of child processes: one thread, a token cache of their own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "CI": "1"}


Train = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_train(environment: dict[str, str], tmp_path: Path) -> Train:
    """Starts `python train.py ARGS` in `tmp_path`, away from the repository."""

    def start(*args: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    return start
