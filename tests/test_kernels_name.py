"""`import kernels` must mean the Hugging Face package of that name, or nothing: never our folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = (
    "import importlib.util as u; s = u.find_spec('kernels'); "
    "print('KERNELS', None if s is None else (s.origin or list(s.submodule_search_locations)))"
)


@pytest.fixture(params=["installed", "absent"])
def hub_kernels(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """A folder that holds a stand-in for the Hugging Face package `kernels`, or None where it is not installed."""
    if request.param == "absent":
        return None
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("HUB = True\n")
    return package.parent


def seen_by(command: list[str], site: Path | None, cwd: Path) -> str:
    """Runs a Python command with a probe that runs at exit, and returns what `kernels` resolved to there."""
    probe = cwd / "probe"
    probe.mkdir()
    # sitecustomize runs before the script; the probe at exit sees the sys.path that the script left
    (probe / "sitecustomize.py").write_text(f"import atexit\natexit.register(lambda: exec({PROBE!r}))\n")
    path = os.pathsep.join(str(p) for p in (probe, site) if p)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False,
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    lines = [line for line in done.stdout.splitlines() if line.startswith("KERNELS")]
    assert lines, done.stdout + done.stderr
    return lines[-1].removeprefix("KERNELS ")


@pytest.mark.parametrize("command", [
    ["train.py", "--help"],
    ["-m", "sparktune.setup.cli", "--help"],
    ["-m", "lab.training_loop.qwen_minimal_bench", "--help"],
    ["-m", "pytest", "--version"],
], ids=lambda c: " ".join(c))
def test_kernels_is_never_our_folder(command: list[str], hub_kernels: Path | None, tmp_path: Path) -> None:
    if command[:2] == ["-m", "pytest"]:  # pytest --version exits before conftest; a collection does not
        command = ["-m", "pytest", "--collect-only", "-q", "tests/test_kernels_name.py"]
    seen = seen_by(command, hub_kernels, tmp_path)
    if hub_kernels is None:
        assert seen == "None"
    else:
        assert seen == str(hub_kernels / "kernels" / "__init__.py")


def test_the_probe_sees_the_shadow(tmp_path: Path) -> None:
    """From the root, without a guard, our folder does shadow the name: the test above can fail."""
    assert str(ROOT / "kernels") in seen_by(["-c", "pass"], None, tmp_path)
