"""Runs the interpreted kernel checks in processes of their own: TRITON_INTERPRET must be set before Triton loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
CHECKS = sorted(FOLDER.glob("check_*.py"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda p: p.stem)
def test_interpreted(check):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(check), "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=500, check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_there_are_checks():
    assert CHECKS
