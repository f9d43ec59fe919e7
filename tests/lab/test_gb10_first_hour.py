"""The first hour's script: clean, listable, honest without a GPU, one row a claim with a stand-in for the tools."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "lab" / "gb10_first_hour.sh"


def run(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *map(str, args)], capture_output=True, text=True, check=False, cwd=ROOT,
                          env={**os.environ, **env})


def stub(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_shellcheck_is_content() -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "shellcheck"), str(SCRIPT)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_module_that_it_starts_exists() -> None:
    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    modules = set(re.findall(r"-m (lab\.[\w.]+)", listed.stdout))
    assert len(modules) >= 8
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    stub(tmp_path / "nvidia-smi", "exit 9")
    done = run(tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 3
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_row_a_claim_and_red_is_red(tmp_path: Path) -> None:
    # the stand-in fails one claim and prints quotes for another
    stub(tmp_path / "nvidia-smi", 'echo "NVIDIA GB10, 12.1, 590.1"')
    stub(tmp_path / "python", 'case "$*" in *memory_sweep*) echo "off by 9 %"; exit 1;; esac; echo "said \\"$2\\""')
    # the demo goes through run.sh, which is not stood in for: a copy of the script beside a run.sh of ours
    (tmp_path / "tree" / "lab").mkdir(parents=True)
    copy = tmp_path / "tree" / "lab" / SCRIPT.name
    copy.write_text(SCRIPT.read_text())
    copy.chmod(0o755)
    stub(tmp_path / "tree" / "run.sh", "echo demo done")
    done = subprocess.run(
        [str(copy), str(tmp_path / "out")], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")},
    )
    assert done.returncode == 1, done.stderr
    assert "1 claims are red" in done.stdout
    with (tmp_path / "out" / "first_hour.csv").open() as file:
        rows = list(csv.DictReader(file))
    listed = run("--list").stdout.splitlines()[::2]
    assert [row["claim"] for row in rows] == [line.split()[0] for line in listed]
    by_claim = {row["claim"]: row for row in rows}
    assert by_claim["memory"]["exit"] == "1"
    assert by_claim["memory"]["last_line"] == "off by 9 %"
    assert by_claim["lossless"]["last_line"] == 'said "lab.lossless"'
    assert by_claim["demo"]["last_line"] == "demo done"
    assert all("GB10" in row["gpu"] for row in rows)
