"""A whole small run with secrets in every place that a user puts them, and with hostile names, rows and prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparktune.setup.demo import make_model, write_smoke

MARK = "hf_Secret0123456789MarkerThatMustNotBeSeen"
PWNED = "PWNED"
SHELL = f"; touch {PWNED}; $(touch {PWNED}) `touch {PWNED}` | touch {PWNED} & touch {PWNED} > {PWNED} #"
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
SCRIPT = f"<script>document.title='{PWNED}'</script><img src=x onerror=\"document.title='{PWNED}'\">"
HOSTILE = f"5 + 5? {SHELL} {ESCAPES} {SCRIPT} {{{{ 7 * 7 }}}}"


@dataclass
class Watched:
    """A process, and every command line that was seen on the machine while it ran."""

    done: subprocess.CompletedProcess[str]
    lines: set[bytes] = field(default_factory=set)


def watched(argv: list[str], place: Path, env: dict[str, str]) -> Watched:
    """Runs `argv` and reads every command line of /proc meanwhile."""
    seen: set[bytes] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for entry in Path("/proc").iterdir():
                if entry.name.isdecimal():
                    try:
                        seen.add((entry / "cmdline").read_bytes())
                    except OSError:
                        continue
            time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        done = subprocess.run(argv, cwd=place, env=env, capture_output=True, text=True, check=False)
    finally:
        over.set()
        thread.join()
    return Watched(done, seen)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / f"a b; touch {PWNED}; $(touch {PWNED}) `touch {PWNED}` <b>"
    folder.mkdir()
    make_model(folder / f"tiny $(touch {PWNED})", vocab_size=512)
    data = folder / f"d'; touch {PWNED} #\x1b[2J.jsonl"
    write_smoke(data)
    row = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]}
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n" + '{"\x1b[2J": 1}\n')
    hub = folder / "home" / "hub"
    hub.mkdir(parents=True)
    (hub / "token").write_text(MARK)
    (hub / "token").chmod(0o600)
    return folder


def environment(place: Path) -> dict[str, str]:
    """Every variable that may hold a secret holds the marker."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    secrets = dict.fromkeys(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN",
         "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"), MARK,
    )
    return {
        **kept, **secrets, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(place / "home" / "hub"),
        "XDG_CACHE_HOME": str(place / "cache"), "XDG_STATE_HOME": str(place / "state"),
        "XDG_CONFIG_HOME": str(place / "config"), "HTTPS_PROXY": f"http://user:{MARK}@127.0.0.1:9",
        "MLFLOW_TRACKING_URI": f"http://user:{MARK}@127.0.0.1:9",
    }


@pytest.fixture(scope="module")
def run(place: Path) -> Watched:
    data = next(place.glob("*.jsonl"))
    return watched(
        [sys.executable, "-P", "-m", "sparktune.setup.cli", "--non-interactive", "--backend", "local", "--plain",
         "--data", data.name, "--model", f"tiny $(touch {PWNED})", "--name", "one", "--gguf", "none", "--mtp", "skip",
         "--max-steps", "2", "--sample-steps", "1", "--learning-rate", "1e-2", "--bad-row-limit", "0.5",
         f"--sample-prompt={HOSTILE}", "--tracker-project", SHELL],
        place, environment(place),
    )


@pytest.mark.slow
def test_the_secret_is_nowhere(place: Path, run: Watched) -> None:
    assert run.done.returncode == 0, run.done.stderr
    assert MARK not in run.done.stdout + run.done.stderr
    files = [p for p in place.rglob("*") if p.is_file() and p != place / "home" / "hub" / "token"]
    names = {p.name for p in files}
    assert {"log.txt", "events.jsonl", "report.html", "summary.json", "plan.yaml", "state.json"} <= names
    assert [str(p) for p in files if MARK.encode() in p.read_bytes()] == []
    assert any(b"sparktune.setup.data.tokenise" in line for line in run.lines)  # the watcher saw the stages
    assert any(b"train.py" in line for line in run.lines)
    assert [line for line in run.lines if MARK.encode() in line] == []


@pytest.mark.slow
def test_no_name_or_prompt_is_a_command(place: Path, run: Watched) -> None:
    assert run.done.returncode == 0, run.done.stderr
    assert list(place.parent.rglob(PWNED)) == []
    assert not list(place.parent.parent.glob(PWNED))


@pytest.mark.slow
def test_no_escape_code_of_the_data_reaches_the_screen(place: Path, run: Watched) -> None:
    shown = run.done.stdout + run.done.stderr
    assert "touch PWNED" in shown  # the prompt was shown
    assert [c for c in shown if not (c.isprintable() or c in "\n\t")] == []
    for words in (["runs", "--plain"], ["runs", "--json"], ["diagnose", "one", "--plain"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sparktune.setup.cli", *words], cwd=place, env=environment(place),
            capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, done.stderr
        assert [c for c in done.stdout + done.stderr if not (c.isprintable() or c in "\n\t")] == []


@pytest.mark.slow
def test_no_script_of_a_sample_runs_in_the_report(place: Path, run: Watched) -> None:
    page = place / "results" / "one" / "report.html"
    text = page.read_text()
    assert "&lt;script&gt;document.title" in text
    assert "<script" not in text
    assert "<img" not in text
