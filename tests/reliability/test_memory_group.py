"""Whole runs in a real memory control group: what cannot fit is refused, and a neighbour that eats it costs nothing.

Slow: they need root (see the fixture), and start eight trainings as processes. The same stop without a group, in one
process, is in tests/training/test_resume.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.demo import make_model, write_smoke
from sparktune.training.checkpoint import checkpoints_of, validate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120  # long enough for a neighbour that eats slowly, on a busy machine
COMMON = [
    "--mode", "lora", "--engine", "native", "--model", "tiny", "--data", "d.jsonl", "--eval-split", "0",
    "--max-steps", str(STEPS), "--save-steps", "10", "--lora-r", "4", "--lora-dropout", "0.1",
    "--learning-rate", "2e-3", "--no-tensorboard",
]
WHOLE = [*COMMON, "--pack-length", "128"]
TRAIN = [sys.executable, str(ROOT / "train.py")]
PIPELINE = [sys.executable, "-P", "-m", "sparktune.setup.cli"]
ANSWERS = ["--non-interactive", "--backend", "local", "--gguf", "none", "--mtp", "skip", "--eval-prompts", "0"]

# Once it is told to, it takes memory until 150 MiB are left in its group; told again, it ends.
NEIGHBOUR = (
    "import sys, time\n"
    "from sparktune.setup.plan.hostmemory import available_bytes\n"
    "sys.stdin.readline()\n"
    "taken = []\n"
    "while available_bytes() > 150 * 2**20:\n"
    "    taken.append(b'x' * (8 * 2**20))\n"
    "    time.sleep(0.002)\n"
    "print('full', flush=True)\n"
    "sys.stdin.readline()\n"
)

Groups = Callable[[int], Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("SPARKTUNE_")]:
        monkeypatch.delenv(name)
    for name, value in {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                        "CI": "1"}.items():
        monkeypatch.setenv(name, value)
    make_model(tmp_path / "tiny", vocab_size=512, dtype="float32")
    write_smoke(tmp_path / "d.jsonl")
    return tmp_path


def finish(process: subprocess.Popen[str], code: int) -> str:
    """Waits for the end and returns what was said on standard error."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}, expected {code}\n{out}\n{err}"
    assert "Traceback" not in err
    return err


def piped(group: Any, argv: list[str], place: Path) -> subprocess.Popen[str]:
    return group.start(argv, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("start", "limit_mib"), [([*TRAIN], 900), ([*PIPELINE, *ANSWERS], 1400)],
                         ids=["train.py", "pipeline"])
def test_a_plan_that_cannot_fit_is_refused_and_what_is_advised_fits(
    memory_group: Groups, place: Path, start: list[str], limit_mib: int
) -> None:
    group = memory_group(limit_mib)
    said = finish(piped(group, [*start, *COMMON, "--pack-length", "16384", "--name", "one"], place), 5)
    found = re.search(r"needs about ([\d.]+) GiB, but ([\d.]+) GiB is there .* Pass (--pack-length \d+) or ", said)
    assert found, said
    assert float(found[2]) < limit_mib / 1024 + 0.1 < float(found[1])
    assert not (place / "results" / "one").exists()
    finish(piped(group, [*start, *COMMON, *found[3].split(), "--name", "one", "--max-steps", "2"], place), 0)
    assert (place / "results" / "one" / "adapter" / "adapter_model.safetensors").is_file()
    assert group.killed() == 0


def eaten(group: Any, argv: list[str], place: Path, run: Path) -> str:
    """Starts a run in the group, lets a neighbour take the memory at the 15th step, and returns what the run said."""
    neighbour = group.start([sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process = piped(group, argv, place)
        deadline = time.monotonic() + 200
        while '"step": 15,' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        neighbour.stdin.write("now\n")
        neighbour.stdin.flush()
        said = finish(process, 75)
        assert neighbour.stdout.readline() == "full\n"
    finally:
        neighbour.communicate("enough\n")
    assert group.killed() == 0
    return said


def checked(said: str, run: Path) -> None:
    """Holds what the stop said and left against what is promised."""
    found = re.search(rf"Stopped after step (\d+) of {STEPS}, because only 0\.1\d GiB of memory is free and the system "
                      r"needs 0\.20; close other programs", said)
    assert found, said
    newest = checkpoints_of(run)[0]
    assert newest.name == f"checkpoint-{found[1]}"
    assert 15 <= int(found[1]) < STEPS
    validate(newest)


def same_end(one: Path, other: Path) -> None:
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
              for run in (one, other)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


def test_a_neighbour_eats_the_memory_of_train_py(memory_group: Groups, place: Path) -> None:
    group, results = memory_group(1400), place / "results"
    finish(piped(group, [*TRAIN, *WHOLE, "--name", "whole"], place), 0)
    said = eaten(group, [*TRAIN, *WHOLE, "--name", "eaten"], place, results / "eaten")
    checked(said, results / "eaten")
    again = re.search(r"Go on with: python (train\.py --resume-from-checkpoint \S+)", said)
    assert again, said
    finish(piped(group, [sys.executable, str(ROOT / "train.py"), *again[1].split()[1:]], place), 0)
    same_end(results / "whole", results / "eaten")


def test_a_neighbour_eats_the_memory_of_the_pipeline(memory_group: Groups, place: Path) -> None:
    group, results = memory_group(1600), place / "results"
    finish(piped(group, [*PIPELINE, *ANSWERS, *WHOLE, "--name", "whole"], place), 0)
    said = eaten(group, [*PIPELINE, *ANSWERS, *WHOLE, "--name", "eaten"], place, results / "eaten")
    checked(said, results / "eaten")
    assert "run.sh resume eaten" in said
    assert not (place / "output" / "eaten").exists()
    finish(piped(group, [*PIPELINE, "resume", "eaten"], place), 0)
    same_end(results / "whole", results / "eaten")
    shards = sorted(path.name for path in (place / "output" / "whole").glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (place / "output" / "eaten" / name).read_bytes() == (place / "output" / "whole" / name).read_bytes()
