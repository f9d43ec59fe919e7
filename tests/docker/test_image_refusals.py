"""What can go wrong while an image is built, on a real engine: each in its own words, and nothing left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.machine import image_build
from sparktune.setup.machine.image import ensure_image
from sparktune.setup.machine.image_build import BuildFailed, Cancelled
from sparktune.setup.plan.errors import PreflightError

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200), pytest.mark.xdist_group("docker-engine")]
ROOT = Path(__file__).resolve().parents[2]
SIX = "six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274\n"
MIB, GIB = 2**20, 2**30


def ignore(event: dict[str, Any]) -> None:
    """Takes events that a test does not look at."""


def build(client: Any, checkout: Any, **more: Any) -> Any:
    return ensure_image(client, checkout.root, "2026.05", "baseline", **{"on_event": ignore, **more})


def says(word: str, then: Any) -> Any:
    """Returns a taker of events that does `then` once, when the build's last line holds `word`."""
    done = threading.Event()

    def take(event: dict[str, Any]) -> None:
        if word in str(event.get("last")) and not done.is_set():
            done.set()
            then()

    return take


@pytest.fixture(params=["client", "sdk"])
def builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two builders that this machine has."""
    if request.param == "sdk":
        monkeypatch.setattr(image_build, "_clients", list)
    return str(request.param)


WRONG_HASH = SIX.replace("4721f391", "00000000")


@pytest.mark.parametrize(
    ("builder", "lock", "finding"),
    [
        ("client", WRONG_HASH, "wrong-hash"), ("sdk", WRONG_HASH, "wrong-hash"),
        ("client", "torch==2.13.0 --hash=sha256:" + "0" * 64 + "\n", "torch-in-lock"),
        ("sdk", "no-such-package-of-ours==1.0 --hash=sha256:" + "0" * 64 + "\n", "no-locked-version"),
    ],
    indirect=["builder"],
)
def test_a_failing_step_is_named(
    client: Any, engine: Any, checkout: Any, builder: str, lock: str, finding: str
) -> None:
    checkout.set_lock(lock)
    before = engine.tags()
    with pytest.raises(BuildFailed) as failed:
        build(client, checkout)
    assert [f.name for f in failed.value.findings] == [finding]
    assert failed.value.findings[0].cause in str(failed.value)
    assert "requirements.lock" in failed.value.step
    assert 0 < len(failed.value.tail) <= 30
    assert failed.value.exit_code == 1
    assert engine.tags() == before
    assert engine.idle()


def test_a_pip_step_that_replaces_torch_is_caught(client: Any, engine: Any, checkout: Any) -> None:
    """The second line of defence: a package whose metadata poses as torch gets past the lock's reading."""
    folder = "/opt/venv/lib/python3.11/site-packages/torch-9.9.dist-info"
    checkout.before_pip(f"mkdir -p {folder} && printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 9.9\\n' "
                        f"> {folder}/METADATA")
    with pytest.raises(BuildFailed, match=r"torch: 2\.11\.0a0\+stub -> 9\.9") as failed:
        build(client, checkout)
    assert [f.name for f in failed.value.findings] == ["torch-replaced"]
    assert engine.idle()


def test_a_base_without_torch_is_refused(client: Any, engine: Any, checkout: Any) -> None:
    engine.docker("build", "--network", "none", "-t", "sparktune-stub-bare:test", "-", input=(
        "FROM sparktune-stub-base:test\nRUN rm -r /usr/local/lib/python3.11/dist-packages/torch-*.dist-info\n"
    ))
    path = checkout.stack("2026.05", "stack.yaml")
    text = re.sub(r"^base_image: .*$", "base_image: sparktune-stub-bare:test", path.read_text("utf-8"), flags=re.M)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BuildFailed, match="the base image has no torch") as failed:
        build(client, checkout)
    assert [f.name for f in failed.value.findings] == ["base-without-torch"]
    assert engine.idle()


def test_too_little_disk_stops_before_the_first_byte(client: Any, engine: Any, checkout: Any) -> None:
    checkout.shrink()
    events: list[dict[str, Any]] = []
    with engine.almost_full(10 * GIB), pytest.raises(PreflightError) as refused:
        build(client, checkout, on_event=events.append)
    assert re.search(r"needs 15 GiB in the engine's folder .* but 10 GiB is free", str(refused.value))
    assert refused.value.exit_code == 3
    assert not [e for e in events if e["kind"] == "progress"]


def test_a_disk_that_fills_up_is_named_and_the_next_start_goes_on(client: Any, engine: Any, checkout: Any) -> None:
    """Forty megabytes to unpack and twenty to put them: a real ENOSPC."""
    lock = checkout.stack("2026.05", "requirements.lock").read_text(encoding="utf-8")
    large = re.search(r"^pyarrow==(?:.*\\\n)*.*\n", lock, flags=re.M)
    assert large is not None
    checkout.before_pip("echo filling up && sleep 5")
    checkout.set_lock(large[0])
    before = engine.tags()
    full = engine.almost_full(20 * MIB)
    try:
        with pytest.raises(BuildFailed) as failed:
            build(client, checkout, on_event=says("filling up", full.__enter__))
    finally:
        full.__exit__(None, None, None)
    assert "disk-full" in [f.name for f in failed.value.findings]
    assert "The disk is full." in str(failed.value)
    assert engine.tags() == before
    assert engine.idle()
    checkout.shrink()
    assert build(client, checkout).built


def test_a_stopped_build_leaves_nothing(client: Any, engine: Any, checkout: Any, builder: str) -> None:
    checkout.stand_still()
    before, stop = engine.tags(), threading.Event()
    with pytest.raises(Cancelled) as cancelled:
        build(client, checkout, on_event=says("standing still", stop.set), should_stop=stop.is_set)
    assert cancelled.value.exit_code == 130
    assert_gone(engine, checkout, before)


def test_ctrl_c_on_the_command_leaves_nothing(client: Any, engine: Any, checkout: Any, tmp_path: Path) -> None:
    """The real program and a real signal, to all of its processes as a terminal sends it."""
    checkout.stand_still()
    before = engine.tags()
    env = {**os.environ, "PYTHONPATH": str(checkout.root / "src")}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sparktune.setup.install", "--baseline", "--plain"], env=env, stdout=said,
            stderr=said, start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not checkout.standing():
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130, (tmp_path / "said").read_text()
    assert "Nothing was tagged" in (tmp_path / "said").read_text()
    assert_gone(engine, checkout, before)


def assert_gone(engine: Any, checkout: Any, before: set[str]) -> None:
    """No process, no container and no tag of a build is left."""
    deadline = time.monotonic() + 30
    while (checkout.standing() or not engine.idle()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert checkout.standing() == []
    assert engine.idle()
    assert engine.tags() == before


def test_a_stack_or_an_engine_that_is_not_there(tmp_path: Path) -> None:
    env = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "sparktune.setup.install", "--plain"]
    down = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert down.returncode == 3
    assert "No Docker engine answers" in down.stderr
    assert "systemctl start docker" in down.stderr


def test_an_engine_that_dies_while_it_builds_is_named(client: Any, engine: Any, checkout: Any) -> None:
    """The last one: what the engine remembers of earlier builds may die with it."""
    checkout.stand_still()
    killed: list[float] = []

    def kill() -> None:
        engine.stop(signal.SIGKILL)
        killed.append(time.monotonic())

    try:
        with pytest.raises(PreflightError, match="engine went away") as gone:
            build(client, checkout, on_event=says("standing still", kill))
        assert killed
        assert time.monotonic() - killed[0] < 30
        assert "systemctl start docker" in str(gone.value)
        assert gone.value.exit_code == 3
    finally:
        for line in checkout.standing():
            os.kill(int(line.split()[0]), signal.SIGKILL)
        engine.start()
    assert engine.idle()
