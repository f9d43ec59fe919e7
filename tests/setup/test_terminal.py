"""The wizard in a real terminal: every screen at two sizes, without colour, with --plain; wrong answers; leaving.

With SCREENS_TO=docs/screens in the environment, each screen is kept there as a picture.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.demo import make_model, write_smoke

Opener = Callable[..., Any]
PROGRAM = [sys.executable, "-P", "-m", "sparktune.setup.cli"]
SMI = """#!/bin/sh
case "$*" in
  *name,compute_cap*) echo "NVIDIA GB10, 12.1, [N/A]";;
  *driver_version*) echo "580.95.05";;
  *temperature.gpu,clocks.sm*) echo "61, 2418, 3003, 97, [N/A]";;
  *clocks.sm,clocks.max.sm*) echo "2418, 3003, 61, 3, P0";;
  *) echo "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0  |";;
esac
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a tiny model, and a hub cache that holds it under the default model's name."""
    folder = tmp_path_factory.mktemp("t")
    make_model(folder / "tiny")
    write_smoke(folder / "d.jsonl")
    good = (folder / "d.jsonl").read_text().splitlines()
    (folder / "bad.jsonl").write_text("\n".join([good[0], "not json", '{"messages": []}', good[1]]) + "\n")
    repository = folder / "hf" / "hub" / "models--Qwen--Qwen3.5-2B"
    shutil.copytree(folder / "tiny", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (folder / "bin").mkdir()
    (folder / "bin" / "nvidia-smi").write_text(SMI)
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    return folder


@pytest.fixture
def place(home: Path) -> Iterator[Path]:
    """A working folder of its own, with a short name (lines that wrap hide it from no picture), data and model."""
    folder = Path(tempfile.mkdtemp(prefix="t"))
    (folder / "tiny").symlink_to(home / "tiny")
    for name in ("d.jsonl", "bad.jsonl"):
        (folder / name).write_bytes((home / name).read_bytes())
    yield folder
    shutil.rmtree(folder)


def picture(shown: Any, name: str, title: str) -> None:
    """Keeps the screen where pictures are asked for."""
    if folder := os.environ.get("SCREENS_TO"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.svg").write_text(shown.svg(title), encoding="utf-8")


def fits(screen: str, columns: int) -> None:
    """No line is wider than the screen, and nothing of a control sequence is seen."""
    assert max(map(len, screen.splitlines())) <= columns
    assert "^[" not in screen
    assert "\x1b" not in screen


COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])m")
"""A colour is set; 39 and 49 only give the terminal's own back."""
WALK = [
    ("machine", "Ready?", ["Enter"]), ("model", "Which model?", ["Down", "Down", "Down", "Down", "Enter"]),
    ("custom-model", "Folder or hub id", ["tiny", "Enter"]), ("data", "Training data", ["d.jsonl", "Enter"]),
    ("preview", "shall be learned", ["Enter"]), ("lengths", "Lengths right?", ["Enter"]),
    ("plan", "Take this plan?", ["Enter"]), ("review", "Everything right?", ["Enter"]),
]
"""(screen, what it asks, keys that lead to the next)."""


@pytest.mark.parametrize(("size", "env"), [
    ((80, 24), {}),
    pytest.param((200, 60), {}, marks=pytest.mark.slow),
    pytest.param((80, 24), {"NO_COLOR": "1"}, marks=pytest.mark.slow),
])
def test_every_screen(terminal: Opener, place: Path, size: tuple[int, int], env: dict[str, str]) -> None:
    shown = terminal("--dry-run", folder=place, size=size, env=env)
    for name, question, keys in WALK:
        screen = shown.wait(question)
        fits(screen, size[0])
        if name == "plan":
            assert "5/6" in screen, "the whole screen is seen, from its heading on"
            assert ("The plan (1 of" in screen) == (size[1] == 24)
        coloured = shown.screen(colours=True)
        if env:
            assert not COLOUR.search(coloured), "NO_COLOR"
            if name == "preview":
                assert "»" in screen.replace(" » ", ""), "what is learned is marked without colour"
        elif name == "preview":
            assert "\x1b[32m" in coloured or "\x1b[1m\x1b[32m" in coloured, "what is learned is green"
        picture(shown, f"{name}-{size[0]}x{size[1]}" + ("-no-color" if env else ""), f"./run.sh: {name}")
        for key in keys:
            shown.press(key) if key in ("Enter", "Down") else shown.type(key)
    shown.wait("exit=0")
    told = shown.screen(history=True)
    assert "The same run again:" in told
    assert not (place / "results").exists(), "a dry run leaves nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {}])
def test_plain_lines(terminal: Opener, place: Path, env: dict[str, str]) -> None:
    shown = terminal("--dry-run", *([] if env else ["--plain"]), folder=place, size=(100, 50), env=env)
    for name, question, answer in (
        ("machine", "Ready?", "1"), ("model", "Which model?", "6"), ("custom", "Folder or hub id", "tiny"),
        ("data", "Training data", "d.jsonl"), ("preview", "shall be learned", ""), ("lengths", "Lengths right?", ""),
        ("plan", "Take this plan?", ""), ("review", "Everything right?", ""),
    ):
        shown.wait(question)
        assert not COLOUR.search(shown.screen(colours=True))
        if name == "model":
            picture(shown, "plain-100x50", "./run.sh --plain: model")
        shown.type(answer)
        shown.press("Enter")
    shown.wait("exit=0")
    assert "»" in shown.screen(history=True)


def test_wrong_answers_lead_back_to_the_question(terminal: Opener, place: Path) -> None:
    shown = terminal("--model", "tiny", "--dry-run", folder=place)
    shown.wait("Ready?")
    shown.press("Enter")
    shown.wait("Training data")
    shown.type("nothing.jsonl")
    shown.press("Enter")
    shown.wait("There is no file nothing.jsonl")
    shown.press("C-u")
    shown.type("ba")
    shown.press("Tab")
    shown.wait("bad.jsonl")
    shown.press("Enter")
    screen = shown.wait("line 3")
    assert "line 2" in screen
    picture(shown, "bad-rows-100x40", "./run.sh: rows that cannot be used")
    shown.press("C-u")
    shown.press("Escape")
    shown.wait("Ready?")
    shown.press("C-c")
    shown.wait("exit=130")
    assert "Your answers are kept" in shown.screen(history=True)
    assert not list(place.glob("results/.pending-*"))
    again = terminal("--model", "tiny", folder=place)
    assert "bad.jsonl" in again.wait("Forget the earlier answers")
    again.press("C-c")
    again.wait("exit=130")


def test_enter_all_the_way_makes_the_plan_of_the_non_interactive_run(
    terminal: Opener, home: Path, place: Path
) -> None:
    """Only --data is given, on a machine with one GPU; the same plan, the same reasons' sources, the same replay."""
    env: dict[str, str | None] = {
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
        "DOCKER_HOST": f"unix://{place / 'no.sock'}", "HF_HUB_CACHE": None,
    }
    words = ["--data", "d.jsonl", "--dry-run", "--json"]
    script = " ".join([*PROGRAM, *words, ">", "wizard.json"])
    shown = terminal(argv=["sh", "-c", script], folder=place, env=env)
    for question in ("Ready?", "Which model?", "shall be learned", "Lengths right?", "Take this plan?", "Everything"):
        shown.wait(question)
        shown.press("Enter")
    shown.wait("exit=0")
    clean = {k: v for k, v in {**os.environ, **env}.items() if v is not None and not k.startswith("SPARKTUNE_")}
    done = subprocess.run(
        [*PROGRAM, "--non-interactive", *words], cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, env={**clean, "XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    alone, asked = json.loads(done.stdout), json.loads((place / "wizard.json").read_text())
    assert alone["machine"]["gpu_name"] == asked["machine"]["gpu_name"] == "NVIDIA GB10"
    assert alone["plan"]["device"] == "cuda"
    assert asked["plan"] == alone["plan"]
    reasons = [[(r["field"], r["value"], r["source"]) for r in told["recommendations"]] for told in (asked, alone)]
    assert reasons[0] == reasons[1]
    assert asked["replay"] == alone["replay"]


@pytest.mark.parametrize("redirect", ["<&-", "</dev/null", "2>err.txt"])
def test_without_a_terminal_nothing_is_asked(terminal: Opener, place: Path, redirect: str) -> None:
    """Standard input closed, standard input elsewhere, standard error elsewhere: exit 2, and what is missing."""
    shown = terminal(argv=["sh", "-c", " ".join([*PROGRAM, redirect])], folder=place)
    shown.wait("exit=2")
    told = shown.screen(history=True) + ((place / "err.txt").read_text() if (place / "err.txt").exists() else "")
    assert "--data" in told
    assert "Traceback" not in told


LIVE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_progress as t
from rich.console import Console
from sparktune.setup.progress import LiveDisplay
display = LiveDisplay(Console(stderr=True))
display.budget_gib = 110.0
display.begin("train", 2, 7)
display._gauges.close()
t.training(60, [0.0], display)
for _ in range(20):
    display._gauges.latest = t.GAUGES
    time.sleep(float(sys.argv[2]))
display.end("train", 120.0, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_the_live_view(terminal: Opener, place: Path, size: tuple[int, int]) -> None:
    argv = [sys.executable, "-P", "-c", LIVE, str(Path(__file__).parent), "0.5"]
    shown = terminal(argv=argv, folder=place, size=size)
    screen = shown.wait("save and stop")
    fits(screen, size[0])
    for words in ("60/100 steps", "18.20 of 110.0 GiB", "61 °C", "step 60"):
        assert words in screen
    picture(shown, f"live-{size[0]}x{size[1]}", "./run.sh: training")
    shown.wait("exit=0")
    assert "[2/7] Train: done" in shown.screen(history=True)


@pytest.mark.slow
def test_from_the_first_question_to_the_result(terminal: Opener, place: Path) -> None:
    """A real run of a tiny model, started by pressing Enter; then doctor, runs and the comparison of two."""
    words = ["--model", "tiny", "--data", "d.jsonl", "--max-steps", "4", "--mtp", "skip", "--gguf", "none",
             "--calibrate", "no", "--backend", "local"]
    shown = terminal(*words, "--name", "one", folder=place, size=(120, 40))
    for question in ("Ready?", "shall be learned", "Lengths right?", "Take this plan?", "Everything right?"):
        shown.wait(question)
        shown.press("Enter")
    shown.wait("exit=0", patience_s=400)
    told = shown.screen(history=True)
    assert "Result of one" in told
    assert "chat one" in told, "what to do next"
    assert told.count("The same run again:") >= 3, "on the review screen, before the start, and at the end"
    picture(shown, "result-120x40", "./run.sh: result")
    second = terminal("--non-interactive", *words, "--name", "two", "--lora-r", "8", "--seed", "1", folder=place)
    second.wait("exit=0", patience_s=400)
    runs = terminal("runs", "one", "two", folder=place, size=(120, 40))
    screen = runs.wait("exit=0")
    assert "--lora-r" in screen
    assert "tokens a second" in screen
    picture(runs, "runs-120x40", "./run.sh runs one two")
    doctor = terminal("doctor", "--model", "tiny", "--data", "d.jsonl", folder=place, size=(120, 40))
    doctor.wait("exit=0")
    picture(doctor, "doctor-120x40", "./run.sh doctor")
    (place / "log.txt").write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    found = terminal("diagnose", "log.txt", folder=place, size=(120, 40))
    assert "--max-seq-length" in found.wait("exit=0")
    picture(found, "diagnose-120x40", "./run.sh diagnose log.txt")
