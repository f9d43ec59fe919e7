"""What a running stage looks like: figures and their trend, plain lines, the live view at two sizes, and the keys."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.keys import StopKeys
from sparktune.setup.machine.gauges import Gauges
from sparktune.setup.plan.config import resolve, save_plan
from sparktune.setup.progress import LiveDisplay, PlainDisplay, make_display
from sparktune.setup.status import StageStatus, amount, sparkline, trend

Opener = Callable[..., Any]
GAUGES = Gauges(temperature_c=61, clock_mhz=2418, load_percent=97, absent="not readable here: power")


def training(steps: int, clock: list[float], status: StageStatus | PlainDisplay | LiveDisplay) -> None:
    """Feeds the events of a training that takes two seconds a step."""
    take = status.take if isinstance(status, StageStatus) else status.event
    for step in range(1, steps + 1):
        clock[0] += 2.0
        take({"kind": "metric", "step": step, "loss": 2.0 / step, "lr": 1e-4, "tok_per_s": 3459.0, "peak_gib": 18.2})
        take({"kind": "progress", "phase": "train", "done": step, "total": 100, "unit": "steps"})
        if step % 5 == 0:
            take({"kind": "metric", "step": step, "eval_loss": 2.5 / step})
            take({"kind": "sample", "step": step, "prompt": "What is\n1 + 1?", "answer": "2\x1b[31m"})


def test_remaining_time_follows_the_pace() -> None:
    clock = [0.0]
    status = StageStatus("train", 110.0, lambda: clock[0])
    assert status.remaining_s() is None
    training(10, clock, status)
    assert status.remaining_s() == pytest.approx(180.0)
    assert status.progress_words() == "10/100 steps, about 3 min left"
    status.take({"kind": "progress", "phase": "train", "done": 100, "total": 100, "unit": "steps"})
    assert status.remaining_s() is None
    status.take({"kind": "progress", "phase": "save", "done": 1, "total": None, "unit": "bytes"})
    assert status.remaining_s() is None, "another phase has its own pace"


def test_one_line_says_it_all() -> None:
    clock = [0.0]
    status = StageStatus("train", 110.0, lambda: clock[0])
    training(10, clock, status)
    line = status.line(GAUGES)
    for words in ("10/100 steps", "about 3 min left", "loss 0.2000 (falling)", "eval 0.2500 (was 0.5000)",
                  "3,459 tok/s", "18.20 of 110.0 GiB", "61 °C", "2,418 MHz", "not readable here: power"):
        assert words in line


@pytest.mark.parametrize(("losses", "direction"), [
    ([], 0), ([2.0], 0), ([2.0, 2.0, 1.0, 1.0], -1), ([1.0, 1.0, 2.0, 2.0], 1), ([1.0] * 50, 0),
    ([1.0] * 40 + [1.001] * 10, 0), (list(range(100, 0, -1)), -1),
])
def test_the_trend_of_losses(losses: list[float], direction: int) -> None:
    assert trend(losses) == direction


def test_bars() -> None:
    assert sparkline([], 8) == ""
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline([3.0, 2.0, 1.0], 8)[0] == "█"
    assert len(sparkline([float(n) for n in range(1000)], 32)) <= 32
    assert amount(1200, 24000, "steps") == "1,200/24,000 steps"
    assert amount(2**29, 2**31, "bytes") == "0.5/2.0 GiB"


def test_plain_lines_come_every_few_seconds() -> None:
    text, clock = io.StringIO(), [0.0]
    display = PlainDisplay(Console(file=text, width=300), lambda: clock[0], lambda: GAUGES)
    display.budget_gib = 110.0
    display.begin("train", 2, 7)
    training(20, clock, display)
    display.end("train", 40.0, 0)
    lines = [line for line in text.getvalue().splitlines() if "tok/s" in line and " of 110.0" in line]
    assert 6 <= len(lines) <= 9, "forty seconds of training, a line every five or six, and the last"
    assert "61 °C" in lines[0]
    assert "step 5: 'What is\\n1 + 1?'" in text.getvalue()
    assert "\x1b" not in text.getvalue(), "not even from an answer"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60)])
def test_the_live_view_fits_its_screen(width: int, height: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    display, clock = LiveDisplay(console), [0.0]
    display.budget_gib = 110.0
    display.begin("train", 2, 7)
    try:
        training(60, clock, display)
        assert display._gauges is not None
        display._gauges.latest = GAUGES
        plain = Console(file=(text := io.StringIO()), width=width, height=height)
        plain.print(display._render())
    finally:
        display.end("train", 120.0, 0)
    shown = text.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert len(shown.splitlines()) <= 10
    for words in ("[2/7] Train", "60/100 steps", "loss", "↓", "eval", "3,459 tok/s", "18.20 of 110.0 GiB", "61 °C",
                  "step 60: 'What is"):
        assert words in shown, shown
    assert "\x1b" not in shown


def test_which_display_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    terminal = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    assert isinstance(make_display(terminal, plain=False), LiveDisplay)
    assert isinstance(make_display(terminal, plain=True), PlainDisplay)
    assert isinstance(make_display(Console(file=io.StringIO()), plain=False), PlainDisplay)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_display(dumb, plain=False), PlainDisplay)
    monkeypatch.setenv("CI", "1")
    assert isinstance(make_display(terminal, plain=False), PlainDisplay)


def test_without_a_terminal_no_key_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("saa"))
    keys = StopKeys(lambda: None)
    assert not keys.active
    keys.poll()
    keys.close()


DRIVER = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from rich.console import Console
    import test_pipeline as t
    from sparktune.setup import pipeline
    from sparktune.setup.plan.config import load_plan
    backend = t.ScriptedBackend(Path(sys.argv[2]))
    backend.behave({"train": {"loop": sys.argv[3]}})
    pipeline.choose_backend = lambda *_, **__: (backend, "for this test")
    plan = load_plan(Path(sys.argv[2]) / "asked.yaml")
    sys.exit(pipeline.run_pipeline(plan, console=Console(stderr=True)))
""")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "tiny")


@pytest.mark.parametrize(("loop", "keys", "code", "words"), [
    ("polite", ["s"], 75, "Stopped in the stage train"),
    ("deaf", ["a", "a"], 130, "Press a again"),
    ("polite", ["C-c"], 75, "saves a checkpoint"),
])
def test_keys_stop_a_running_stage(
    terminal: Opener, model: Path, tmp_path: Path, loop: str, keys: list[str], code: int, words: str
) -> None:
    write_smoke(tmp_path / "d.jsonl")
    plan = resolve({"model": str(model), "data": tmp_path / "d.jsonl", "results": tmp_path / "results",
                    "output": tmp_path / "output", "name": "one"}, {}, {}, {})
    save_plan(plan, tmp_path / "asked.yaml")
    shown = terminal(argv=[sys.executable, "-P", "-c", DRIVER, str(Path(__file__).parent), str(tmp_path), loop])
    screen = shown.wait("save and stop")
    assert "[2/7] Train" in screen
    assert (tmp_path / "results" / "one" / "plan.yaml").is_file()
    while not (tmp_path / "ready").exists():
        shown.wait("save and stop")
    for key in keys:
        shown.press(key)
    shown.wait(f"exit={code}")
    told = shown.screen(history=True)
    assert words in told
    assert "resume" in told
    state = json.loads((tmp_path / "results" / "one" / "state.json").read_text())["stages"]
    assert set(state) == {"prepare"}
