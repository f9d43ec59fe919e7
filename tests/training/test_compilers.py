"""The `specs` trap: real gcc, train.py's own process, and a working directory that holds a file or a folder `specs`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparktune.training.compilers import private_compilers

ROOT = Path(__file__).resolve().parents[2]
GCC = shutil.which("gcc")
BUILD = """
import os, pathlib, tempfile
from triton.runtime.build import _build
with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / "stub.c"
    source.write_text("int stub(void) { return 0; }")
    print("compiled", pathlib.Path(_build("stub", str(source), folder, [], [], [], [])).is_file())
"""


def trapped(place: Path, kind: str) -> dict[str, str]:
    """Makes the working directory and returns the environment of images whose LIBRARY_PATH ends in a colon."""
    place.mkdir()
    if kind == "file":
        (place / "specs").write_text("a list of what was asked for\n")
    elif kind == "folder":
        (place / "specs").mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    return {**kept, "LIBRARY_PATH": "/usr/lib:", "XDG_CACHE_HOME": str(place.parent / "cache"), "OMP_NUM_THREADS": "1"}


def run(code: str, place: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], cwd=place, env=env, capture_output=True, text=True,
        check=False,
    )


@pytest.mark.parametrize(("kind", "said"), [("file", "malformed"), ("folder", "Is a directory")])
def test_gcc_falls_into_it_without_us_and_not_with_us(tmp_path: Path, kind: str, said: str) -> None:
    assert GCC, "this test compiles with the real gcc"
    env = trapped(tmp_path / "work", kind)
    without = run(BUILD, tmp_path / "work", env)
    assert without.returncode != 0
    assert "specs" in without.stderr
    assert said in without.stderr
    private_compilers(env)
    done = run(BUILD, tmp_path / "work", env)
    assert done.stdout == "compiled True\n", done.stderr


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_train_py_compiles_away_from_the_callers_folder(tmp_path: Path, kind: str) -> None:
    env = trapped(tmp_path / "work", kind)
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import atexit, os, pathlib\n"
        f"def build():\n    exec({BUILD!r}, {{}})\n"
        "    print('cc', os.environ['CC'])\n"
        "atexit.register(build)\n"
    )
    env["PYTHONPATH"] = str(hook)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--model", "/nowhere/model", "--train-data", "/nowhere/rows.jsonl"],
        cwd=tmp_path / "work", env=env, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "compiled True" in done.stdout, done.stderr
    assert str(tmp_path / "cache") in done.stdout
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["specs"]


def test_the_compiler_starts_in_a_folder_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "my cc"
    own.write_text("#!/bin/sh\npwd\n")
    own.chmod(0o755)
    env = {**os.environ, "CC": str(own), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    os.environ["XDG_CACHE_HOME"], before = str(tmp_path / "cache"), os.environ.get("XDG_CACHE_HOME")
    try:
        private_compilers(env)
        first = env["CC"]
        private_compilers(env)
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        os.environ.update({"XDG_CACHE_HOME": before} if before else {})
    assert env["CC"] == first, "a second time changes nothing"
    done = subprocess.run([env["CC"]], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Path(first).parent)


@pytest.mark.parametrize(
    ("before", "after"),
    [("/a:", "/a"), (":", None), ("", None), ("/a::/b", "/a:/b"), (".:/a", "/a"), ("/a:/b", "/a:/b")],
)
def test_only_absolute_places_are_searched(before: str, after: str | None) -> None:
    env = {"LIBRARY_PATH": before, "GCC_EXEC_PREFIX": "here"}
    private_compilers(env)
    assert env.get("LIBRARY_PATH") == after
    assert "GCC_EXEC_PREFIX" not in env
