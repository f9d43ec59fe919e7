"""fla's kernels of a GDN layer, both pinned versions, five model sizes, compiled for GB10 where one is simulated."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparktune.lab.sm121a import SHARED_LIMIT
from sparktune.lab.sm121a_fla import PINS, TARGET

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {
    "l2norm_fwd_kernel", "l2norm_bwd_kernel", "chunk_local_cumsum_scalar_kernel",
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel", "recompute_w_u_fwd_kernel",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunk_fwd_kernel_o", "chunk_bwd_kernel_dv_local",
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64", "chunk_bwd_kernel_dqkwg", "prepare_wy_repr_bwd_kernel",
    "layer_norm_gated_fwd_kernel", "layer_norm_gated_bwd_kernel",
}
EXCEPTIONS = {("0.6.0", "chunk_bwd_kernel_dqkwg"): 40, ("0.6.0", "prepare_wy_repr_bwd_kernel"): 544}
"""(version, kernel) -> bytes of spills a thread, stores and loads; docs/lab-log.md says what they cost at most."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", PINS)
def test_a_listed_configuration_of_every_kernel_holds(version: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sparktune.lab.sm121a_fla", version], capture_output=True, text=True,
                          check=False, cwd=ROOT)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows, done.stderr[-3000:]
    assert " ".join(sorted({size for row in rows for size in row["sizes"].split()})) == "0.8B 27B 2B 4B 9B"
    for heads in ("16/16", "16/32", "16/48"):
        assert {row["name"].split()[0] for row in rows if row["name"].endswith(heads)} == EXPECTED
    for row in rows:
        known = EXCEPTIONS.get((version, row["name"].split()[0]), 0)
        assert row["shared_bytes"] <= SHARED_LIMIT, row
        assert row["spill_bytes"] <= known, row
        assert row["mma"] or not row["has_dot"], row
    with TARGET.open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["fla"] == version]
    what = ("name", "sizes", "shared_bytes", "registers", "spill_bytes", "num_warps", "num_stages", "tiles")
    got = [[str(row[column]) for column in what] for row in rows]
    assert got == [[row[column] for column in what] for row in table]


def test_the_pins_are_the_images() -> None:
    locks = {path.parent.name: path.read_text() for path in ROOT.glob("docker/stacks/*/fast-path.lock")}
    for stack, version in {"2026.05": "0.5.0", "2026.10": "0.6.0"}.items():
        assert f"fla-core=={version} " in locks[stack]
        assert PINS[version].partition("--hash=")[2] in locks[stack]


def test_a_gb10_is_seen_before_fla_decides() -> None:
    """Version 0.5.0 tests for capability 10 alone and so misses a GB10's 12.1; 0.6.0 takes both."""
    code = (
        "import sys; from sparktune.lab.sm121a_fla import fla_folder, simulate_gb10\n"
        "sys.path.insert(0, str(fla_folder(sys.argv[1]))); simulate_gb10()\n"
        "from fla.utils import IS_NVIDIA_BLACKWELL, IS_NVIDIA_HOPPER, check_shared_mem\n"
        "print(IS_NVIDIA_BLACKWELL, IS_NVIDIA_HOPPER, check_shared_mem('ada'), check_shared_mem('ampere'))"
    )
    for version, answer in {"0.5.0": "False False True False", "0.6.0": "True False True False"}.items():
        done = subprocess.run([sys.executable, "-c", code, version], capture_output=True, text=True, check=False)
        assert done.stdout.strip().splitlines()[-1:] == [answer], done.stderr[-2000:]
