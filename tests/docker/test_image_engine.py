"""Images built by a real engine from real wheels. What needs CUDA to compile is stubbed in the base (docker/stub)."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.machine import image_build, image_checks
from sparktune.setup.machine.image import HASH_LABEL, ensure_image
from sparktune.setup.machine.image_build import BuildFailed, Cancelled
from sparktune.setup.plan.errors import PreflightError

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400), pytest.mark.xdist_group("docker-engine")]
DEBIAN = "sparktune-stub-debian:test"


def ignore(event: dict[str, Any]) -> None:
    """Takes events that a test does not look at."""


@pytest.fixture(autouse=True)
def _small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub's image is a tenth of the real one, and so is what it needs."""
    monkeypatch.setattr(image_checks, "DISK_WITH_BASE_GIB", 8.0)
    monkeypatch.setattr(image_checks, "MEMORY_GIB", 1.0)


def tags(client: Any) -> set[str]:
    return {tag for image in client.images.list() for tag in image.tags if tag.startswith("sparktune:")}


def set_lock(checkout: Path, text: str, stack: str = "2026.05") -> None:
    (checkout / "docker" / "stacks" / stack / "requirements.lock").write_text(text, encoding="utf-8")


SIX = "six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274\n"


def test_the_fast_image_builds_once(client: Any, checkout: Path) -> None:
    """opt, 2026.05, BuildKit: build, nothing to do, one changed pin."""
    events: list[dict[str, Any]] = []
    first = ensure_image(client, checkout, "2026.05", "opt", on_event=events.append)
    assert first.built
    assert {first.tag, first.alias} <= tags(client)
    attributes = client.images.get(first.tag).attrs["Config"]
    assert attributes["User"] == "10001"
    assert attributes["Labels"][HASH_LABEL][:12] == first.tag[-12:]
    assert attributes["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    log = first.log.read_text(encoding="utf-8")
    allowed = {line.split("pip check: ", 1)[1] for line in log.splitlines() if " pip check: unsloth" in line}
    assert allowed == {
        "unsloth 2026.5.2 has requirement torch<2.11.0,>=2.4.0, but you have torch 2.11.0a0+stub.",
        "unsloth-zoo 2026.5.1 has requirement torch<2.11.0,>=2.4.0, but you have torch 2.11.0a0+stub.",
    }
    assert "pip check: 2 lines, all known for this stack" in log
    assert "Successfully installed causal-conv1d-1.6.1" in log
    assert "-DCMAKE_CUDA_ARCHITECTURES=121a" in log
    bill = json.loads(first.log.with_suffix(".sbom.json").read_text(encoding="utf-8"))
    assert {"transformers", "unsloth", "causal-conv1d"} <= {
        c["name"].lower().replace("_", "-") for c in bill["components"]
    }
    assert "transformers==5.5.0" in first.log.with_suffix(".freeze.txt").read_text(encoding="utf-8")
    steps = [e for e in events if e["kind"] == "progress"]
    assert steps[-1]["done"] == steps[-1]["total"]
    assert all(a["done"] <= b["done"] for a, b in itertools.pairwise(steps))

    begun = time.monotonic()
    second = ensure_image(client, checkout, "2026.05", "opt", on_event=ignore)
    assert time.monotonic() - begun < 3
    assert (second.id, second.built) == (first.id, False)

    sources = checkout / "docker" / "stacks" / "2026.05" / "sources.lock"
    other = (checkout / "docker" / "stacks" / "2026.10" / "sources.lock").read_text(encoding="utf-8")
    sources.write_text(other, encoding="utf-8")
    third = ensure_image(client, checkout, "2026.05", "opt", on_event=ignore)
    log = third.log.read_text(encoding="utf-8")
    assert third.tag != first.tag
    assert "Successfully installed causal-conv1d-1.7.0" in log
    assert "Successfully installed absl" not in log, "the pins below must come from the cache"


def test_the_baseline_image_builds_without_buildkit(
    client: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """baseline, 2026.10, the SDK's stream: `pip check` prints nothing; clean removes and reuses no layer."""
    monkeypatch.setattr(image_build, "_clients", list)
    events: list[dict[str, Any]] = []
    made = ensure_image(client, checkout, "2026.10", "baseline", on_event=events.append)
    assert {e["chosen"] for e in events if e["kind"] == "choice"} == {"sdk"}
    log = made.log.read_text(encoding="utf-8")
    assert "pip check: 0 lines, all known for this stack" in log
    assert events[-1]["total"] == events[-2]["total"] > 20
    assert "No broken requirements found." in client.containers.run(
        made.tag, ["python", "-m", "pip", "check"], remove=True, network_mode="none"
    ).decode()
    set_lock(checkout, SIX, "2026.10")
    (checkout / "docker" / "smoke_test.py").write_text("", encoding="utf-8")  # six alone passes no smoke test
    small = ensure_image(client, checkout, "2026.10", "baseline", on_event=ignore)
    again = ensure_image(client, checkout, "2026.10", "baseline", on_event=ignore, rebuild="clean")
    assert again.tag == small.tag
    assert again.id != small.id
    assert "Using cache" not in again.log.read_text(encoding="utf-8")


@pytest.mark.parametrize("builder", ["buildkit", "sdk"])
@pytest.mark.parametrize(
    ("lock", "finding"),
    [
        (SIX.replace("4721f391", "00000000"), "wrong-hash"),
        ("torch==2.13.0 --hash=sha256:" + "0" * 64 + "\n", "torch-in-lock"),
        ("no-such-package-of-ours==1.0 --hash=sha256:" + "0" * 64 + "\n", "no-locked-version"),
    ],
)
def test_a_failing_pip_step_is_named(
    client: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch, lock: str, finding: str, builder: str
) -> None:
    if builder == "sdk":
        monkeypatch.setattr(image_build, "_clients", list)
    set_lock(checkout, lock)
    before = tags(client)
    with pytest.raises(BuildFailed) as failed:
        ensure_image(client, checkout, "2026.05", "baseline", on_event=ignore)
    assert finding in [f.name for f in failed.value.findings]
    assert "requirements.lock" in failed.value.step
    assert 0 < len(failed.value.tail) <= 30
    assert failed.value.exit_code == 1
    assert tags(client) == before
    assert client.containers.list(all=True) == []


def test_a_pip_step_that_replaces_torch_is_caught(client: Any, checkout: Path) -> None:
    """The second line of defence: a package whose metadata poses as torch gets past the lock's reading."""
    set_lock(checkout, SIX)
    dockerfile = checkout / "docker" / "Dockerfile"
    sneak = ("mkdir -p /opt/venv/lib/python3.11/site-packages/torch-9.9.dist-info && printf 'Metadata-Version: 2.1\\n"
             "Name: torch\\nVersion: 9.9\\n' > /opt/venv/lib/python3.11/site-packages/torch-9.9.dist-info/METADATA && ")
    text = dockerfile.read_text(encoding="utf-8")
    dockerfile.write_text(text.replace("    python /opt/sparktune-build/verify_base.py check\nCOPY", f"    {sneak}"
                                       "python /opt/sparktune-build/verify_base.py check\nCOPY", 1), encoding="utf-8")
    with pytest.raises(BuildFailed, match=r"torch: 2\.11\.0a0\+stub -> 9\.9"):
        ensure_image(client, checkout, "2026.05", "baseline", on_event=ignore)


def test_a_base_without_torch_is_refused(client: Any, engine: Any, checkout: Path) -> None:
    path = checkout / "docker" / "stacks" / "2026.05" / "stack.yaml"
    engine.docker("build", "--network", "none", "-t", "sparktune-stub-bare:test", "-", input=(
        "FROM sparktune-stub-base:test\nRUN rm -r /usr/local/lib/python3.11/dist-packages/torch-*.dist-info\n"
    ))
    text = path.read_text(encoding="utf-8").replace("sparktune-stub-base:test", "sparktune-stub-bare:test")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BuildFailed, match="the base image has no torch"):
        ensure_image(client, checkout, "2026.05", "baseline", on_event=ignore)


def _slow(checkout: Path) -> None:
    """Makes the build stand still where pip would start."""
    set_lock(checkout, SIX)
    dockerfile = checkout / "docker" / "Dockerfile"
    text = dockerfile.read_text(encoding="utf-8")
    dockerfile.write_text(text.replace("    python -m pip install", "    echo standing still && sleep 301 && \\\n"
                                       "    python -m pip install", 1), encoding="utf-8")


def _running(text: str) -> list[str]:
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if text in line and "ps -eo" not in line and "pytest" not in line]


@pytest.mark.parametrize("builder", ["buildkit", "sdk"])
def test_a_stopped_build_leaves_nothing(
    client: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch, builder: str
) -> None:
    if builder == "sdk":
        monkeypatch.setattr(image_build, "_clients", list)
    _slow(checkout)
    before, stop = tags(client), threading.Event()

    def watch(event: dict[str, Any]) -> None:
        if "standing still" in str(event.get("last")):
            stop.set()

    with pytest.raises(Cancelled) as cancelled:
        ensure_image(client, checkout, "2026.05", "baseline", on_event=watch, should_stop=stop.is_set)
    assert cancelled.value.exit_code == 130
    deadline = time.monotonic() + 30
    while (_running("sleep 301") or client.containers.list(all=True)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert _running("sleep 301") == []
    assert client.containers.list(all=True) == []
    assert tags(client) == before


def test_an_engine_that_dies_while_it_builds_is_named(client: Any, engine: Any, checkout: Path) -> None:
    _slow(checkout)
    killed = threading.Event()

    def watch(event: dict[str, Any]) -> None:
        if "standing still" in str(event.get("last")) and not killed.is_set():
            killed.set()
            engine.stop(signal.SIGKILL)

    try:
        with pytest.raises(PreflightError, match="engine went away"):
            ensure_image(client, checkout, "2026.05", "baseline", on_event=watch)
        assert killed.is_set()
    finally:
        for line in _running("sleep 301"):
            os.kill(int(line.split()[0]), signal.SIGKILL)
        engine.start()


def test_install_says_what_an_engine_that_is_down_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparktune.setup.install import main

    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["--plain"]) == 3
