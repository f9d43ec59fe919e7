"""install.sh's program on a real engine: its verdicts, and that it removes what it made and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup import install
from sparktune.setup.machine import image_checks
from sparktune.setup.machine.docker_backend import RUN_LABEL
from sparktune.setup.machine.image import HASH_LABEL
from sparktune.setup.plan.rundir import cache_dir

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400), pytest.mark.xdist_group("docker-engine")]
ROOT = Path(__file__).resolve().parents[2]
SIX = "six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274\n"


def _small(checkout: Path, monkeypatch: pytest.MonkeyPatch, smoke: str) -> None:
    """Makes the stack one package and the smoke test one line, so that a build takes seconds."""
    monkeypatch.setattr(install, "program_root", lambda: checkout)
    monkeypatch.setattr(image_checks, "DISK_WITH_BASE_GIB", 4.0)
    monkeypatch.setattr(image_checks, "MEMORY_GIB", 0.5)
    (checkout / "docker" / "stacks" / "2026.05" / "requirements.lock").write_text(SIX, encoding="utf-8")
    (checkout / "docker" / "smoke_test.py").write_text(
        f"import sys\nif '--build' not in sys.argv:\n    print('''{smoke}''')\n", encoding="utf-8"
    )


def _line(status: str, detail: str) -> str:
    return json.dumps({"check": "one", "status": status, "seconds": 0.1, "detail": detail})


@pytest.mark.parametrize(
    ("status", "detail", "code", "word"),
    [("pass", "fine", 0, "Installed"), ("fail", "wrong", 1, "Not installed"),
     ("skip", "needs a CUDA device; none is visible here", 75, "not tested on a GPU")],
)
def test_the_exit_code_says_what_was_tested(
    client: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str,
    detail: str, code: int, word: str,
) -> None:
    _small(checkout, monkeypatch, _line(status, detail))
    assert install.main(["--baseline", "--json", "--plain"]) == code
    said = json.loads(capsys.readouterr().out)
    assert said["code"] == code
    assert word in said["verdict"]
    assert ("Installed" in said["verdict"]) == (code == 0)
    assert said["image"]["tag"].startswith("sparktune:2026.05-baseline-")
    assert client.containers.list(all=True) == []


def test_a_full_disk_stops_before_the_first_byte(
    client: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _small(checkout, monkeypatch, "")
    monkeypatch.setattr(image_checks, "DISK_WITH_BASE_GIB", 1e6)
    assert install.main(["--baseline", "--plain"]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "Not built" in said
    assert "GiB is free" in said


def test_uninstall_removes_ours_and_nothing_else(
    client: Any, engine: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small(checkout, monkeypatch, _line("pass", "fine"))
    assert install.main(["--baseline", "--plain"]) == 0
    client.containers.create("sparktune-stub-base:test", "true", labels={RUN_LABEL: "/x"}, network_mode="none")
    theirs = client.containers.create("sparktune-stub-base:test", "true", network_mode="none")
    engine.docker("tag", "sparktune-stub-base:test", "sparktune:not-ours")
    assert install.main(["--uninstall", "--plain"]) == 0
    assert client.images.list(filters={"label": HASH_LABEL}) == []
    assert [c.id for c in client.containers.list(all=True)] == [theirs.id]
    assert "sparktune:not-ours" in client.images.get("sparktune-stub-base:test").tags
    assert list(cache_dir("images").glob("*")) == []
    theirs.remove()
    client.images.remove("sparktune:not-ours")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.opt"])
def test_hadolint_finds_nothing(name: str) -> None:
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([tool, ROOT / "docker" / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
