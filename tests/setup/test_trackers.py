"""Trackers: figures arrive in order, a failing library ends the tracking and nothing else; and the real libraries."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from sparktune.setup import trackers
from sparktune.setup.machine.doctor import TRACKER_PACKAGES, run_checks
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.trackers import Tracking, open_tracking

EVENTS = [
    {"kind": "start"}, {"kind": "metric", "step": 1, "loss": 2.0, "lr": 1e-4, "tok_per_s": 900.0, "note": "x"},
    {"kind": "progress", "phase": "train", "done": 1, "total": 2, "unit": "steps"},
    {"kind": "metric", "step": 2, "loss": None, "lr": 5e-5}, {"kind": "metric", "step": 2, "eval_loss": 1.5},
]


class Recorder:
    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.ended: bool | None = None
        self.fail_at = fail_at

    def log(self, step: int, values: dict[str, float]) -> None:
        if step == self.fail_at:
            raise ConnectionError("the server is gone")
        self.seen.append((step, dict(values)))

    def finish(self, ok: bool) -> None:
        self.ended = ok


def test_figures_arrive_and_nothing_else() -> None:
    recorder = Recorder()
    tracking = Tracking(recorder, "x", lambda text, level: None)
    for event in EVENTS:
        tracking.event(event)
    tracking.finish(True)
    assert recorder.seen == [
        (1, {"loss": 2.0, "lr": 1e-4, "tok_per_s": 900.0}), (2, {"lr": 5e-5}), (2, {"eval_loss": 1.5})
    ]
    assert recorder.ended is True


def test_a_tracker_that_fails_is_left_out_once() -> None:
    said: list[str] = []
    recorder = Recorder(fail_at=2)
    tracking = Tracking(recorder, "wandb", lambda text, level: said.append(text))
    for event in EVENTS:
        tracking.event(event)
    tracking.finish(True)
    assert len(said) == 1
    assert "the server is gone" in said[0]
    assert "Training goes on" in said[0]
    assert recorder.ended is None


def test_a_tracker_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(plan: Plan, run: RunDir) -> None:
        raise RuntimeError("no key")

    monkeypatch.setitem(trackers._KINDS, "wandb", refuse)
    said: list[str] = []
    run = RunDir.from_root(tmp_path, tmp_path)
    tracking = open_tracking(Plan(tracker="wandb"), run, lambda text, level: said.append(text))
    tracking.event(EVENTS[1])
    assert ["no key" in s for s in said] == [True]
    assert open_tracking(Plan(tracker="wandb"), run, lambda *_: pytest.fail("asked"), "merge") is not None


def test_a_missing_library_is_found_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sparktune.setup.machine.doctor.importlib.util.find_spec", lambda name: None)
    plan = Plan(tracker="trackio", results=tmp_path / "r", output=tmp_path / "o")
    (check,) = [c for c in run_checks(plan) if c.name == "tracker"]
    assert check.status == "failed"
    assert "pip install 'trackio>=" in check.fix
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for tracker, packages in TRACKER_PACKAGES.items():
        assert shlex.split(packages) == extras[tracker]


SCRIPT = textwrap.dedent("""
    import json, os, sys
    from pathlib import Path
    from sparktune.setup.plan.rundir import RunDir
    from sparktune.setup.plan.schema import Plan
    from sparktune.setup.trackers import open_tracking
    kind, root = sys.argv[1], Path(sys.argv[2])
    root.mkdir(parents=True, exist_ok=True)
    def say(text, level):
        sys.exit(text)
    for steps in ((1, 2), (3,)):  # the second round is a resume: the same tracker's run goes on
        tracking = open_tracking(Plan(tracker=kind, tracker_project="tests"), RunDir.from_root(root, root), say)
        for step in steps:
            tracking.event({"kind": "metric", "step": step, "loss": 2.0 / step, "eval_loss": 1.0 / step})
        tracking.finish(True)
    if kind == "mlflow":
        from mlflow import MlflowClient
        client = MlflowClient(tracking_uri=f"sqlite:///{root.parent / 'mlflow.db'}")
        run = json.loads((root / "tracker.json").read_text())["mlflow"]
        found = [(m.step, m.value) for m in client.get_metric_history(run, "loss")]
        status = client.get_run(run).info.status
    elif kind == "trackio":
        from trackio.sqlite_storage import SQLiteStorage
        found = [(row["step"], row["loss"]) for row in SQLiteStorage.get_logs("tests", root.name) if "loss" in row]
        status = "FINISHED"
    else:
        kept = sorted((root / "wandb").glob("offline-run-*/*.wandb"))
        found = [[len(kept), sum(p.stat().st_size for p in kept) > 0]]
        status = "FINISHED"
    print(json.dumps({"found": found, "status": status}))
""")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_the_real_library_offline(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Installs the extra beside the project's own environment, and reads back what the library kept."""
    wanted = shlex.split(TRACKER_PACKAGES[kind])
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True, capture_output=True)
    site = json.loads(subprocess.run(
        [sys.executable, "-c", "import json, sys; print(json.dumps([p for p in sys.path if p]))"],
        capture_output=True, text=True, check=True,
    ).stdout)
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"),
           "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(p for p in site if "site-packages" in p or p.endswith("src"))}
    done = subprocess.run(
        [str(python), "-P", "-c", SCRIPT, kind, str(tmp_path / "results" / "one")], capture_output=True, text=True,
        check=False, env=env, cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "FINISHED"
    if kind == "wandb":
        assert told["found"] == [[2, True]], "one offline folder a session"
    else:
        assert [tuple(f) for f in told["found"]] == [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]
