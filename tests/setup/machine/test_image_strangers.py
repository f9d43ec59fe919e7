"""What people type wrong or have set up otherwise, at `./install.sh`, `--backend docker` and scripts/run.sh.

Each ends in one sentence and its exit code, and never in a traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError

from sparktune.setup import install
from sparktune.setup.machine import doctor
from sparktune.setup.machine.docker_backend import DockerBackend, container_options, hub_token
from sparktune.setup.machine.engine import connect, start_container
from sparktune.setup.machine.image import ensure_image
from sparktune.setup.plan.config import resolve
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import Plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("address", "says"), [
    ("garbage", "should name an engine of this machine.*it is garbage"),
    ("ssh://somebody@spark", "folders of the machine that its engine runs on"),
    ("tcp://10.0.0.7:2375", "Unset DOCKER_HOST"),
    ("unix:///etc/passwd", r"No Docker engine answers at unix:///etc/passwd \(connection refused\)"),
    ("unix:///no/such.sock", r"at unix:///no/such\.sock \(no such file or directory\).*systemctl start docker"),
    ("tcp://127.0.0.1:1", r"at tcp://127\.0\.0\.1:1 \(connection refused\)"),
])
def test_an_engine_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, address: str, says: str
) -> None:
    monkeypatch.setenv("DOCKER_HOST", address)
    with pytest.raises(PreflightError, match=says) as refused:
        connect()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mode", ["name=rootless", "name=userns"])
def test_an_engine_that_changes_user_ids_is_refused(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    options = ["name=seccomp,profile=default"]
    client = SimpleNamespace(ping=lambda: True, info=lambda: {"SecurityOptions": options})
    monkeypatch.setattr("docker.client.DockerClient.from_env", lambda **_: client)
    assert connect() is client
    options.append(mode)
    with pytest.raises(PreflightError, match="files would not be yours"):
        connect()


@pytest.mark.parametrize(("words", "says"), [
    (["--frobnicate"], "unrecognized arguments"), (["word"], "unrecognized arguments"),
    (["--stack", "2025.01"], "should be one of 2026.05, 2026.10; it is 2025.01"), (["--stack", ""], "it is ."),
    (["--rebuild=twice"], "invalid choice"), (["--max-jobs", "0"], "at least 1; got 0"),
    (["--max-jobs", "-3"], "at least 1; got -3"), (["--max-jobs", "many"], "at least 1; got many"),
    (["--gates", "--uninstall"], "--gates goes alone; drop --uninstall"),
    (["--uninstall", "--rebuild=clean"], "--uninstall goes alone; drop --rebuild"),
])
def test_install_refuses_before_it_looks_for_an_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.setattr(install, "connect", lambda: pytest.fail("wrong use needs no engine"))
    with pytest.raises(SystemExit) as ended:
        install.main(words)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_stack_that_nobody_has_is_wrong_use_and_not_a_missing_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such.sock")
    with pytest.raises(UsageError, match=r"2026\.05, 2026\.10; it is 2020"):
        DockerBackend(Plan(model="Qwen/Qwen3.5-2B", backend="docker", stack="2020"))


def test_a_missing_engine_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such.sock")
    plan = Plan(backend="docker", results=tmp_path / "results", output=tmp_path / "output")
    found = [c for c in doctor.machine_checks(plan) if "No Docker engine" in c.seen]
    assert [c.name for c in found] == ["engine"]
    assert "backend" in {c.name for c in doctor.machine_checks(plan.model_copy(update={"backend": "local"}))}


@pytest.mark.parametrize(
    "model", ["/nope", "./nope", "../nope", "nope/", "a//b", "a b/c", "~nobody-here/x", "-x/y", ""]
)
def test_a_model_that_is_no_model_is_wrong_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    """The hub's client raises an error of its own for each of these."""
    monkeypatch.chdir(tmp_path)
    plan = resolve({"model": model}, {}, {}, {})
    found = {c.name: c for c in doctor.run_checks(plan)}["model"]
    assert (found.status, found.exit_code) == ("failed", 2), found
    with pytest.raises(UsageError, match="should"):
        probe(plan.model)


def test_a_folder_that_docker_cannot_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "train.jsonl").touch()
    run = RunDir(name="r", results_root=tmp_path / "results", output_root=tmp_path / "output")
    plan = Plan(model=str(tmp_path), data=folder / "train.jsonl", output=tmp_path / "output")
    engine: Any = SimpleNamespace(networks=SimpleNamespace(list=lambda names: []))
    with pytest.raises(PreflightError, match="holds a colon"):
        container_options(engine, "prepare", run, plan, gpus=False, image="i")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is in the way, which stops root too."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nothing: Any = SimpleNamespace()
    with pytest.raises(PreflightError, match=r"cache/sparktune/images, where nothing can be written \(Not a directory"):
        ensure_image(nothing, ROOT, "2026.05", on_event=lambda event: None)
    run = RunDir(name="r", results_root=tmp_path / "results", output_root=tmp_path / "output")
    plan = Plan(model=str(tmp_path), output=tmp_path / "output")
    with pytest.raises(PreflightError, match=r"should write to .*which cannot be made"):
        container_options(nothing, "prepare", run, plan, gpus=False, image="i")


@pytest.mark.parametrize(("said", "sentence"), [
    ('could not select device driver "" with capabilities: [[gpu]]', "no way to give a container this machine's GPUs"),
    ("unknown or invalid runtime name: nvidia", "nvidia-ctk runtime configure"),
    ("error mounting /x: no such file", "would not start a container: error mounting /x"),
])
def test_a_container_that_does_not_start_is_one_sentence(said: str, sentence: str) -> None:
    def refuse() -> None:
        raise APIError("500 Server Error", explanation=said)

    with pytest.raises(PreflightError, match=sentence) as refused:
        start_container(SimpleNamespace(start=refuse))
    assert "\n" not in str(refused.value)


def test_a_token_finds_a_place_where_the_runtime_folder_is_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    with hub_token() as token:
        assert token is not None
        assert token.read_text() == "hf_x"
        assert token.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def docker_on_path(tmp_path: Path) -> dict[str, str]:
    """A `docker` that has an image, or none, or no engine, as FAKE says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(
        '#!/bin/sh\ncase $FAKE in none) echo "Error: No such image: x" >&2; exit 1;;\n'
        'down) echo "Cannot connect to the Docker daemon at unix:///x. Is it running?" >&2; exit 1;; esac\n'
    )
    (folder / "docker").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def test_run_sh_and_the_program_ignore_a_relative_cache_and_run_sh_wants_a_home(
    docker_on_path: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(ROOT / "scripts" / "run.sh")
    env = {**docker_on_path, "FAKE": "", "XDG_CACHE_HOME": "relative"}
    printed = subprocess.run(
        [script, "--print", "ls"], capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert f"{tmp_path}/.cache/sparktune:/cache/sparktune" in printed.stdout
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir("x") == tmp_path / ".cache" / "sparktune" / "x"
    homeless = {name: value for name, value in env.items() if name != "HOME"}
    done = subprocess.run([script, "ls"], capture_output=True, text=True, check=False, env=homeless, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "HOME should name your home folder" in done.stderr


@pytest.mark.parametrize(("fake", "folder", "code", "says"), [
    ("none", "plain", 3, "is not here; make it with ./install.sh"), ("down", "plain", 3, "engine does not answer"),
    ("", "a:b", 2, "holds a colon"),
])
def test_run_sh_tells_a_missing_image_from_a_missing_engine(
    docker_on_path: dict[str, str], tmp_path: Path, fake: str, folder: str, code: int, says: str
) -> None:
    (tmp_path / folder).mkdir()
    done = subprocess.run([ROOT / "scripts" / "run.sh", "--data", tmp_path / folder, "ls"], capture_output=True,
                          text=True, check=False, env={**docker_on_path, "FAKE": fake})
    assert done.returncode == code
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_command_itself_ends_with_its_code(tmp_path: Path) -> None:
    env = {**os.environ, "DOCKER_HOST": "unix:///no/such.sock", "XDG_CACHE_HOME": str(tmp_path)}
    for words, code in ((["--stack", "1"], 2), ([], 3), (["--uninstall"], 3)):
        done = subprocess.run([sys.executable, "-P", "-m", "sparktune.setup.install", *words, "--plain"], env=env,
                              capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-P", "-m", "sparktune.setup.install", "--json"], env=env,
                          capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert said["code"] == done.returncode == 3
    assert "No Docker engine answers" in said["verdict"]
