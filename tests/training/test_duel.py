"""The duel of the engines: who is raced, what is counted, and that a chip races once."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from sparktune.setup.plan.engines import choose_engine, undecided
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import Machine
from sparktune.setup.plan.speeds import BUILT_IN
from sparktune.training import duel, engine_choice

SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
GPU = Machine(device="cuda", gpu_name="NVIDIA Odd", capability=(12, 1), memory_gib=100, cpu_cores=4, disk_free_gib=10)
RACER = textwrap.dedent("""
    import json, pathlib, sys
    words = dict(zip(sys.argv[1::1], sys.argv[2::1]))
    engine, steps = words["--engine"], int(words["--max-steps"])
    if engine in words.get("--fails", ""):
        sys.exit("it has no such kernel")
    folder = pathlib.Path(words["--results"]) / words["--name"]
    folder.mkdir(parents=True)
    speed = {"native": 300.0, "unsloth": 200.0}[engine]
    rows = [{"step": i, "tok_per_s": 1.0 if i < 8 else speed} for i in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
""")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for train.py that writes metrics."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "racer.py"
    path.write_text(RACER)
    return path


def test_the_faster_engine_is_taken_and_remembered(script: Path) -> None:
    said: list[str] = []
    assert undecided(SPEC, GPU, mode="lora", speeds=[*BUILT_IN, *duel.known_speeds()])
    found = duel.race(script, ["--engine", "auto"], SPEC, GPU, "lora", said.append)
    assert [s.engine for s in found] == ["native", "unsloth"]
    assert "300 tok/s" in " ".join(said)
    speeds = [*BUILT_IN, *duel.known_speeds()]
    assert not undecided(SPEC, GPU, mode="lora", speeds=speeds)
    choice = choose_engine(SPEC, GPU, mode="lora", unsloth_installed=True, speeds=speeds)
    assert choice.engine == "native"
    assert "1.5 times" in choice.reason


def test_an_engine_that_fails_decides_nothing(script: Path) -> None:
    said: list[str] = []
    found = duel.race(script, ["--fails", "unsloth"], SPEC, GPU, "lora", said.append)
    assert [s.engine for s in found] == ["native"]
    assert "it has no such kernel" in " ".join(said)
    assert duel.known_speeds() == []


def test_a_command_line_races_once(tiny_model: Path, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "_machine", lambda: GPU)
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda name: object())
    races: list[int] = []
    real = duel.race
    monkeypatch.setattr(engine_choice, "race", lambda *a: races.append(1) or real(*a))
    flags = {"model": str(tiny_model), "data": "x.jsonl", "mode": "lora"}
    for duelling, expected in ((False, 0), (True, 1), (True, 1)):
        choice = engine_choice.engine_of_command({**flags, "engine_duel": duelling}, None, {}, script, [])
        assert choice is not None
        assert choice.engine == "native"
        assert len(races) == expected
