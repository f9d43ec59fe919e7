"""The measurement of a link, between two processes of this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from sparktune.setup.plan.links import MEASURED


@pytest.mark.slow
def test_two_processes_measure_what_is_between_them() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"2@127.0.0.1:{free.getsockname()[1]}"
    argv = [sys.executable, "-m", "sparktune.training.linktest", "--cpu", "--node"]
    other = subprocess.Popen([*argv, f"1/{meeting}"], stdout=subprocess.PIPE, text=True)
    first = subprocess.run([*argv, f"0/{meeting}"], capture_output=True, text=True, timeout=200, check=False)
    assert other.communicate(timeout=60)[0] == ""
    assert first.returncode == other.returncode == 0, first.stderr[-2000:]
    answer = json.loads(first.stdout.removeprefix(MEASURED))
    assert (answer["backend"], answer["interface"], answer["ranks"]) == ("gloo", "lo", 2)
    assert answer["bytes_per_s"] > 1e6
    assert answer["times"] >= 3
