"""The commands as a user starts them: exit codes, what goes to which stream, nothing asked without a terminal."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktune.setup.arguments import COMMANDS, parse
from sparktune.setup.cli import main
from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.plan.config import resolve, save_plan
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.schema import Plan
from sparktune.setup.replay import replay_arguments, replay_command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space in its name, the tiny model, fifty rows, and three rows of which one is broken."""
    folder = tmp_path_factory.mktemp("a place")
    make_model(folder / "tiny")
    shutil.copytree(folder / "tiny", folder / "alien")
    config = json.loads((folder / "alien" / "config.json").read_text())
    (folder / "alien" / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "alien"}))
    write_smoke(folder / "d.jsonl")
    (folder / "bad.jsonl").write_text('{"text": "a b c d"}\nnot json\n{"text": "e f g h"}\n')
    return folder


def call(place: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the program in `place`, without a terminal."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_") and k != "CI"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "sparktune.setup.cli", *arguments], cwd=place, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
        env={**clean, "XDG_CACHE_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", **(env or {})},
    )


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 2, ["--data", "not a terminal"]),
    (["--non-interactive"], 2, ["--data", "--non-interactive"]),
    (["--non-interactive", "--model", "alien"], 2, ["--data", "--yes", "alien"]),
    (["--non-interactive", "--model", "alien", "--data", "d.jsonl"], 2, ["--yes", "alien"]),
    (["analyze"], 2, ["--data"]),
    (["plan", "--json"], 2, ["--data"]),
    (["--lora-rank", "3"], 2, ["--lora-rank", "--lora-r"]),
    (["--epochs", "many"], 2, ["--epochs", "many"]),
    (["--epochs", "0", "--lora-r", "-1"], 2, ["--epochs", "greater than 0", "--lora-r", "at least 1"]),
    (["--mode", "best"], 2, ["--mode", "best", "lora"]),
    (["resum", "x"], 2, ["resum", "resume"]),
    (["run"], 2, ["run", "runs"]),
    (["runs", "a", "b"], 2, ["no run a", "none"]),
    (["diagnose", "nope.log"], 2, ["nope.log", "log file"]),
    (["diagnose", "a", "b"], 2, ["diagnose", "b"]),
    (["doctor", "x"], 2, ["doctor", "x"]),
    (["resume"], 2, ["resume RUN", "none"]),
    (["resume", "nope"], 2, ["nope", "plan.yaml"]),
    (["evaluate", "nope"], 2, ["nope"]),
    (["chat", "nope"], 2, ["nope"]),
    (["resume", "x", "--lora-r", "3"], 2, ["--lora-r", "new run"]),
    (["--demo", "--data", "d.jsonl"], 2, ["--demo", "--data"]),
    (["--config", "nope.yaml"], 2, ["nope.yaml"]),
    (["--static-lora", "--mode", "full"], 2, ["--static-lora", "--mode full"]),
    (["analyze", "--data", "nope.jsonl", "--model", "tiny"], 4, ["nope.jsonl"]),
    (["analyze", "--data", "tiny", "--model", "tiny"], 4, ["not a file"]),
    (["analyze", "--data", "bad.jsonl", "--model", "tiny"], 4, ["bad.jsonl", "line 2"]),
    (["analyze", "--data", "d.jsonl", "--model", "./no-model"], 2, ["no-model"]),
    (["analyze", "--data", "d.jsonl", "--model", "nobody/nothing"], 3, ["nobody/nothing", "cache"]),
    (["analyze", "--data", "d.jsonl", "--model", "tiny", "--results", "d.jsonl/r"], 3, ["--results"]),
    (["analyze", "--data", "d.jsonl", "--model", "tiny", "--backend", "docker"], 3, ["docker", "--backend local"]),
    (["plan", "--data", "d.jsonl", "--model", "tiny", "--gguf", "q9"], 2, ["q9", "q8_0"]),
    (["plan", "--data", "d.jsonl", "--model", "tiny", "--results", "x", "--output", "./x"], 2, ["--results", "two"]),
    (["plan", "--data", "d.jsonl", "--model", "tiny", "--target-modules", "q_prj"], 2, ["q_prj", "in_proj_z"]),
    (["plan", "--data", "d.jsonl", "--model", "tiny", "--mode", "full", "--quantise-base", "nf4"], 2, ["--mode qlora"]),
    (["plan", "--data", "d.jsonl", "--model", "tiny", "--engine", "unsloth"], 3, ["CUDA", "--engine native"]),
    (["plan", "--data", "d.jsonl", "--model", "tiny", "--optimizer", "adamw_8bit"], 3, ["CUDA", "--optimizer adamw"]),
    (["plan", "--data", "d.jsonl", "--model", "alien"], 3, ["alien", "CUDA", "--engine unsloth"]),
    (["plan", "--data", "d.jsonl", "--model", "tiny", "--device", "cuda"], 3, ["GPU", "--device cpu"]),
])
def test_what_cannot_be_done(
    place: Path, arguments: list[str], code: int, words: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(arguments) == code
    told = capsys.readouterr()
    assert told.out == "", "data goes to standard output, and there is none"
    assert all(w in " ".join(told.err.split()) for w in words), told.err
    assert "Traceback" not in told.err
    assert not (place / "results").exists()


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 2, ["--data", "not a terminal"]),
    (["analyze", "--data", "nope.jsonl", "--model", "tiny"], 4, ["nope.jsonl"]),
])
def test_exit_codes_reach_the_shell(place: Path, arguments: list[str], code: int, words: list[str]) -> None:
    done = call(place, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert all(w in done.stderr for w in words), done.stderr


def test_analyze(place: Path) -> None:
    done = call(place, "analyze", "--data", "d.jsonl", "--model", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 50
    done = call(place, "analyze", "--data", "d.jsonl", "--model", "tiny", "--plain")
    assert "50 messages" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert not (place / "results").exists()


def test_plan_and_dry_run_say_the_same(place: Path) -> None:
    arguments = ["--data", "d.jsonl", "--model", "tiny", "--lora-r", "4", "--json"]
    first, second = call(place, "plan", *arguments), call(place, "--dry-run", "--non-interactive", *arguments)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    told = json.loads(first.stdout)
    assert told["plan"] == json.loads(second.stdout)["plan"]
    assert told["plan"]["lora_r"] == 4
    assert told["plan"]["origins"]["mode"] == "recommendation"
    assert shlex.split(told["replay"])[0].endswith("run.sh")
    shown = call(place, "plan", "--data", "d.jsonl", "--model", "tiny")
    assert "--pack-length" in shown.stdout
    assert "recommended" in shown.stdout
    assert not (place / "results").exists()


def test_doctor(place: Path) -> None:
    done = call(place, "doctor", "--model", "tiny", "--data", "d.jsonl", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"]) == (0, True), done.stdout
    assert {"os", "driver", "toolkit", "engine", "disk", "page cache", "clocks", "hub", "token", "specs", "packages",
            "leftovers", "memory", "model", "data", "exports"} <= {c["name"] for c in told["checks"]}
    done = call(place, "doctor", "--model", "nobody/nothing")
    assert done.returncode == 3
    assert "failed" in done.stdout
    (place / "specs").mkdir()
    try:
        done = call(place, "doctor", "--model", "tiny")
        assert (done.returncode, "gcc" in done.stdout) == (0, True)
    finally:
        (place / "specs").rmdir()


def test_environment_and_config(place: Path) -> None:
    (place / "c.yaml").write_text("adapter:\n  rank: 5\n  alpha: 6\ndataset:\n  path: d.jsonl\nmodel: tiny\n")
    done = call(place, "plan", "--json", "--config", "c.yaml", env={"SPARKTUNE_LORA_ALPHA": "7"})
    told = json.loads(done.stdout)["plan"]
    assert (told["lora_r"], told["lora_alpha"]) == (5, 7.0)
    assert (told["origins"]["lora_r"], told["origins"]["lora_alpha"]) == ("config", "environment")


def test_runs(place: Path, tmp_path: Path) -> None:
    done = call(place, "runs", "--json", "--results", str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    save_plan(Plan(name="one", mode="lora"), tmp_path / "one" / "plan.yaml")
    save_plan(Plan(name="x"), tmp_path / ".pending-x" / "plan.yaml")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "plan.yaml").write_text("nonsense: 1\n")
    done = call(place, "runs", "--json", "--results", str(tmp_path))
    assert [r["name"] for r in json.loads(done.stdout)] == ["one"]
    assert "two" in done.stderr


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sparktune.setup.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_flags_may_stand_anywhere() -> None:
    for words in (["resume", "r", "--plain"], ["--plain", "resume", "r"], ["resume", "--plain", "r"]):
        asked = parse(words)
        assert (asked.command, asked.run, asked.plain) == ("resume", "r", True)


def test_a_resume_takes_what_a_stop_at_a_bad_step_advises() -> None:
    asked = parse(["resume", "r", "--on-bad-step", "skip", "--loss-spike", "0"])
    assert asked.flags == {"on_bad_step": "skip", "loss_spike": 0.0}
    with pytest.raises(UsageError, match=r"--seed would change it.* resume takes --on-bad-step, --loss-spike"):
        parse(["resume", "r", "--on-bad-step", "skip", "--seed", "5"])
    for command in ("evaluate", "chat"):
        with pytest.raises(UsageError, match="--on-bad-step would change it"):
            parse([command, "r", "--on-bad-step", "skip"])


@pytest.mark.parametrize("word", ["\x1b[2J\x07", "a\nb\r\tc", "it's \\ \n $(touch PWNED) `touch PWNED` !!",
                                  "\u202e\x9b31m é", "\udcff\udc80", "-\n"])
def test_a_replay_command_can_be_shown_and_pasted(word: str, tmp_path: Path) -> None:
    plan = Plan.model_construct(**{**Plan().model_dump(), "sample_prompts": [word, "plain"], "text_field": word,
                                   "validator": ["judge", word]})
    command = replay_command(plan)
    assert command.isprintable()
    shown = f"{sys.executable} -c 'import sys; print(ascii(sys.argv[1:]))' {command.partition(' ')[2]}"
    done = subprocess.run(["bash", "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == replay_arguments(plan)
    assert list(tmp_path.iterdir()) == []


def test_the_replay_command_makes_the_same_plan() -> None:
    plan = resolve({
        "data": "a b.jsonl", "model": "./m o", "lora_r": 8, "gguf": [], "pack": False,
        "sample_prompts": ["a 'b'", "-c"],
        "learning_rate": 1e-5, "target_modules": ["q_proj", "k_proj"], "text_field": "-x", "static_lora": True,
    }, {}, {}, {})
    again = resolve(parse(replay_arguments(plan)).flags, {}, {}, {})
    ignore = {"origins", "static_lora"}
    assert again.model_dump(exclude=ignore) == plan.model_dump(exclude=ignore)
    assert shlex.split(replay_command(plan))[1:] == replay_arguments(plan)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from(["--data", "--json", "resume", "--epochs", "--"]), max_size=4))
def test_no_command_line_escapes_as_a_traceback(words: list[str]) -> None:
    with contextlib.suppress(UsageError, SystemExit):
        parse(words)


def test_defects_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sparktune.setup.cli.run_checks", lambda plan: 1 / 0)
    assert main(["doctor"]) == 1
    assert "defect" in capsys.readouterr().err
