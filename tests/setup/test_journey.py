"""The whole journey for a user's own data and model, every stage real: tiny, but nothing in it is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.plan.config import load_plan
from sparktune.setup.runstate import STAGES


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a journey")
    make_model(folder / "tiny")
    write_smoke(folder / "d.jsonl")
    return folder


def call(place: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "sparktune.setup.cli", *arguments], cwd=place, input=stdin, capture_output=True,
        text=True, check=False, env={**env, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def journey(place: Path) -> subprocess.CompletedProcess[str]:
    return call(
        place, "--non-interactive", "--backend", "local", "--data", "d.jsonl", "--model", "tiny", "--name", "one",
        "--max-steps", "3", "--save-steps", "2", "--eval-steps", "3", "--learning-rate", "1e-2", "--json",
        "--sample-prompt", "What is 5 + 5?",
    )


def test_every_file_of_the_contract_is_there(place: Path, journey: subprocess.CompletedProcess[str]) -> None:
    assert journey.returncode == 0, journey.stderr
    root, output = place / "results" / "one", place / "output"
    for name in ("plan.yaml", "state.json", "events.jsonl", "metrics.jsonl", "log.txt", "data/report.json", "adapter",
                 "samples.jsonl", "summary.json", "report.html", "checkpoint-2"):
        assert (root / name).exists(), name
    for name in ("one/config.json", "one-mtp-default/config.json", "one-gguf/Modelfile", "one-gguf/manifest.json"):
        assert (output / name).is_file(), name
    names = {path.name for path in (output / "one-gguf").glob("*.gguf")}
    assert names == {"one-Q8_0.gguf", "mmproj-one-F16.gguf"}  # the base sees pictures too
    steps = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == [1, 2, 3]
    assert tuple(json.loads((root / "state.json").read_text())["stages"]) == STAGES
    assert json.loads(journey.stdout) == json.loads((root / "summary.json").read_text())
    assert not list(place.rglob("*.partial"))
    assert load_plan(root / "plan.yaml").origins["lora_r"] == "recommendation"


def test_nothing_is_done_twice(place: Path, journey: subprocess.CompletedProcess[str]) -> None:
    before = (place / "results" / "one" / "events.jsonl").read_bytes()
    done = call(place, "resume", "one")
    assert done.returncode == 0, done.stderr
    assert (place / "results" / "one" / "events.jsonl").read_bytes() == before
    assert "one-gguf" in done.stdout


def test_the_run_is_listed(place: Path, journey: subprocess.CompletedProcess[str]) -> None:
    (row,) = json.loads(call(place, "runs", "--json").stdout)
    assert (row["name"], row["finished"], row["mode"]) == ("one", True, "lora")


def test_its_name_is_taken(place: Path, journey: subprocess.CompletedProcess[str]) -> None:
    done = call(place, "--non-interactive", "--data", "d.jsonl", "--model", "tiny", "--name", "one")
    assert done.returncode == 2
    assert "resume one" in done.stderr


def test_one_can_talk_to_it(place: Path, journey: subprocess.CompletedProcess[str]) -> None:
    done = call(place, "chat", "one", stdin="\n")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "output/one" in done.stderr
    spoken = subprocess.run(
        [sys.executable, "-P", "-m", "sparktune.setup.chat", "--model", str(place / "output" / "one"),
         "--max-new-tokens", "4"],
        input="What is 5 + 5?\nAnd 6 + 6?\n", capture_output=True, text=True, check=False,
    )
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout.count("\n") >= 2
