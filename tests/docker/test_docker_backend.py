"""A run through the Docker backend on a real engine, on the CPU; torch in the stub base is a real CPU build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.demo_corpus import write_smoke
from sparktune.setup.demo_model import make_model
from sparktune.setup.machine import docker_backend, image_checks
from sparktune.setup.machine.backends import StopSignals
from sparktune.setup.machine.docker_backend import RUN_LABEL, DockerBackend
from sparktune.setup.machine.image import ensure_image
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import Plan

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400), pytest.mark.xdist_group("docker-engine")]
CONVERTER = cache_dir("llama.cpp")
MARKER = "hf_MarkerThatMustNeverShow0123456789"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model and data."""
    folder = tmp_path_factory.mktemp("demo")
    make_model(folder / "model")
    write_smoke(folder / "smoke.jsonl")
    return folder


@pytest.fixture
def command(client: Any, engine: Any, checkout: Path, tmp_path: Path, demo: Path) -> Any:
    """Starts the command line of the checkout in `tmp_path`, as run.sh does."""
    cache = tmp_path / "cache" / "sparktune" / "llama.cpp"
    if CONVERTER.is_dir():
        shutil.copytree(CONVERTER, cache)
    home = tmp_path / "hub"
    home.mkdir()
    (home / "token").write_text(MARKER, encoding="utf-8")
    env = {**os.environ, "DOCKER_HOST": engine.host, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(home),
           "PYTHONPATH": str(checkout / "src"), "CI": "true"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "sparktune.setup.cli", *arguments], cwd=tmp_path, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )

    return start


def flags(demo: Path, name: str, *more: str) -> list[str]:
    return ["--non-interactive", "--plain", "--backend", "docker", "--device", "cpu", "--mode", "lora", "--name", name,
            "--model", str(demo / "model"), "--data", str(demo / "smoke.jsonl"), "--learning-rate", "3e-3",
            "--eval-split", "0", *more]


def test_the_whole_journey_in_containers_survives_a_killed_one(
    command: Any, client: Any, engine: Any, tmp_path: Path, demo: Path
) -> None:
    process = command(*flags(demo, "journey", "--epochs", "4", "--save-steps", "2", "--gguf", "q8_0"))
    run = tmp_path / "results" / "journey"
    seen: list[str] = []
    deadline = time.monotonic() + 1500
    while time.monotonic() < deadline and process.poll() is None:
        for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run}"}):
            seen.append(json.dumps(container.attrs))
            if list(run.glob("checkpoint-*/")) and container.labels["org.sparktune.stage"] == "train":
                container.kill(signal="SIGKILL")
                deadline = 0.0
        time.sleep(0.3)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 137, said[-3000:]
    assert "resume journey" in said
    assert client.containers.list(all=True) == []

    again = command("resume", "journey", "--plain", "--json")
    said_again, _ = again.communicate(timeout=1200)
    assert again.returncode == 0, said_again[-3000:]
    for path in ("summary.json", "report.html", "adapter/adapter_model.safetensors"):
        assert (run / path).is_file()
    assert list((tmp_path / "output" / "journey-gguf").glob("*.gguf"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "resumed steps must follow, not repeat"
    log = (run / "log.txt").read_text(encoding="utf-8", errors="replace")
    assert log.count("container sparktune-journey-") >= 7
    # only a path to the token travels
    assert seen
    everything = "".join([*seen, said, said_again, log, (run / "events.jsonl").read_text(encoding="utf-8")])
    assert "/run/secrets/hub" in everything
    images = client.images.list(name="sparktune")
    everything += "".join(engine.docker("history", "--no-trunc", image.id).stdout for image in images)
    assert images
    assert MARKER not in everything
    assert '"NetworkMode": "none"' in seen[0]


def _one_stage(checkout: Path, tmp_path: Path, client: Any, demo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(image_checks, "DISK_WITH_BASE_GIB", 8.0)
    monkeypatch.setattr(image_checks, "MEMORY_GIB", 1.0)
    monkeypatch.setattr(docker_backend, "program_root", lambda: checkout)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    plan = Plan(model=str(demo / "model"), data=demo / "smoke.jsonl", backend="docker", device="cpu",
                results=tmp_path / "results", output=tmp_path / "output", mode="lora", eval_split=0.0)
    run = RunDir(name="one", results_root=plan.results, output_root=plan.output)
    run.root.mkdir(parents=True)
    save_plan(plan, run.plan)
    ensure_image(client, checkout, plan.stack, "opt", on_event=lambda event: None)
    return plan, run, DockerBackend(plan)


def test_a_stage_writes_as_the_calling_user(
    checkout: Path, tmp_path: Path, client: Any, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run, backend = _one_stage(checkout, tmp_path, client, demo, monkeypatch)
    monkeypatch.setattr(docker_backend.os, "getuid", lambda: 12345)
    monkeypatch.setattr(docker_backend.os, "getgid", lambda: 12346)
    for folder in (tmp_path, run.root, plan.output, tmp_path / "hub", *(cache_dir(k) for k in
                                                                        ("home", "tokens", "llama.cpp"))):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, 12345, 12346)
    for folder in [*tmp_path.parents, *demo.parents, demo]:
        if folder != Path("/") and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    with StopSignals() as stop:
        code = backend.run_stage("prepare", run, plan, on_poll=lambda: None, stop=stop, lock_fd=None)
    assert code == 0, run.log.read_text()[-2000:]
    made = [p for p in run.root.rglob("*") if p.is_file() and p.name not in ("plan.yaml", "log.txt")]
    assert run.data_report in made
    assert {(p.stat().st_uid, p.stat().st_gid) for p in made} == {(12345, 12346)}


def test_a_stop_reaches_the_process_inside(
    checkout: Path, tmp_path: Path, client: Any, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run, backend = _one_stage(checkout, tmp_path, client, demo, monkeypatch)
    with StopSignals() as stop:
        assert backend.run_stage("prepare", run, plan, on_poll=lambda: None, stop=stop, lock_fd=None) == 0
        plan = plan.model_copy(update={"num_epochs": 500.0, "learning_rate": 1e-3, "lora_r": 8, "save_steps": 1000,
                                       "gradient_accumulation": 1, "pack_length": 64, "target_modules": None})
        save_plan(plan, run.plan)

        def poll() -> None:
            if run.metrics.is_file() and run.metrics.read_text().count("\n") >= 2:
                stop.count = 1

        code = backend.run_stage("train", run, plan, on_poll=poll, stop=stop, lock_fd=None)
    assert code == 75, run.log.read_text()[-2000:]
    assert list(run.root.glob("checkpoint-*"))
    assert client.containers.list(all=True) == []


def test_a_container_that_a_killed_start_left_is_ended_first(
    checkout: Path, tmp_path: Path, client: Any, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run, backend = _one_stage(checkout, tmp_path, client, demo, monkeypatch)
    left = client.containers.run(
        "sparktune:2026.05-opt", ["sleep", "600"], detach=True, network_mode="none", labels={RUN_LABEL: str(run.root)}
    )
    monkeypatch.setattr(docker_backend, "_STOP_S", 1)
    with StopSignals() as stop:
        assert backend.run_stage("prepare", run, plan, on_poll=lambda: None, stop=stop, lock_fd=None) == 0
    assert left.name in run.log.read_text()
    assert client.containers.list(all=True) == []
