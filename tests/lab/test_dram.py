"""Reading ncu's CSV, and the whole command with a stand-in for ncu."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from sparktune.lab.dram import METRICS, read_traffic

ROOT = Path(__file__).resolve().parents[2]
PAGE = f'''==PROF== Connected to process 12
"ID","Process ID","Kernel Name","{METRICS[0]}","{METRICS[1]}"
"","","","byte","byte"
"0","12","gemm","1,000","500"
"1","12","norm(float *, int)","10","20"
"2","12","gemm","1,000.00","0"
'''


def test_bytes_and_launches_of_each_kernel() -> None:
    assert read_traffic(PAGE.splitlines()) == {"gemm": (2000, 500, 2), "norm(float *, int)": (10, 20, 1)}
    assert read_traffic(["==ERROR== no permission"]) == {}


def run(tmp_path: Path, tool: str | None, *args: str) -> subprocess.CompletedProcess[str]:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    if tool is not None:
        (folder / "ncu").write_text(f"#!{sys.executable}\n{tool}")
        (folder / "ncu").chmod(0o755)
    return subprocess.run([sys.executable, "-m", "lab.dram", "native", *args], capture_output=True, text=True, cwd=ROOT,
                          check=False, env={**os.environ, "PATH": f"{folder}:/usr/bin", "OMP_NUM_THREADS": "1"})


def test_the_row(tmp_path: Path) -> None:
    table = tmp_path / "profile.csv"
    tool = f"import sys; open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({PAGE!r})"
    done = run(tmp_path, tool, "--lengths", "100", "--accum", "1", "--csv", str(table))
    assert done.returncode == 0, done.stderr
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["bytes_per_token"], row["launches"], row["variant"]) == ("25", "3", "native")
    assert "DRAM" in row["bytes_are"]


def test_without_counters_it_says_what_to_do(tmp_path: Path) -> None:
    refused = run(tmp_path, "print('ERR_NVGPUCTRPERM')")
    assert refused.returncode == 3
    assert "ERR_NVGPUCTRPERM" in refused.stderr
    assert "lab.profile" in refused.stderr
    (tmp_path / "bin" / "ncu").unlink()
    missing = run(tmp_path, None)
    assert missing.returncode == 3
    assert "not on PATH" in missing.stderr
