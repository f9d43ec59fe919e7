"""Which GPUs nvidia-smi is asked about; nvidia-smi is a script on PATH that knows two of them and takes --id."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparktune.setup.machine.detect import detect_machine, nvidia_gpus
from sparktune.setup.machine.gauges import query_gpu

SMI = """#!/bin/sh
ids=0,1
for word; do case $word in --id=*) ids=${word#--id=} ;; esac; done
for id in $(echo "$ids" | tr , ' '); do
  case $id in
    0 | GPU-aaaa) echo "First, 12.1, 1024" ;;
    1 | GPU-bbbb) echo "Second, 9.0, 2048" ;;
    *) echo "No devices were found"; exit 6 ;;
  esac
done
"""


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("visible", "names"), [
    (None, ["First", "Second"]),
    ("0", ["First"]),
    ("1", ["Second"]),
    ("1, 0", ["Second", "First"]),
    ("GPU-bbbb", ["Second"]),
    ("", []),
    ("-1", []),
    ("1,-1,0", ["Second"]),  # CUDA stops at the first that it cannot read
    ("MIG-cccc", ["First", "Second"]),
    ("7", []),
])
def test_the_gpus_are_those_that_cuda_shows(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [name for name, _, _ in nvidia_gpus()] == names
    first = query_gpu("name", "compute_cap", "memory.free")
    assert (first[0] if first else None) == (names[0] if names else None)


def test_a_machine_whose_gpus_are_hidden_trains_on_its_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    assert detect_machine("auto", tmp_path).gpu_name == "First"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_machine("auto", tmp_path).device == "cpu"
