"""Checkpoints appear whole or not at all, and damage is seen and named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparktune.setup.plan.errors import ExitCode, PreflightError, SparktuneError
from sparktune.training import checkpoint as cp
from sparktune.training.checkpoint import LoopState


def engine_state() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32)
    return {
        "master.a": base.view(4, 6), "master.view": base.view(4, 6).t(), "half": base[:5].bfloat16(),
        "double": base.double(), "step": torch.tensor(3.0), "empty": torch.zeros(0, 7),
        "generator": torch.randint(0, 255, (16,), dtype=torch.uint8),
    }


def export(folder: Path) -> None:
    folder.mkdir()
    save_file({"w": torch.ones(3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def save(root: Path, step: int) -> Path:
    return cp.save_checkpoint(root, LoopState(step=step, position=step * 2, maths={"seed": 1}), engine_state(), export,
                              "adapter")


def test_tensors_written_by_us_are_what_safetensors_reads(tmp_path: Path) -> None:
    state = engine_state()
    cp.write_safetensors(tmp_path / "x.safetensors", state)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_a_dtype_outside_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        cp.write_safetensors(tmp_path / "x.safetensors", {"c": torch.zeros(2, dtype=torch.complex64)})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = save(tmp_path, 7)
    expected = torch.rand(4)
    torch.manual_seed(99)
    assert path.name == "checkpoint-7"
    cp.validate(path)
    assert cp.load_loop_state(path) == LoopState(step=7, position=14, maths={"seed": 1})
    assert torch.equal(cp.load_engine_state(path)["master.view"], engine_state()["master.view"])
    cp.restore_rng(path)
    assert torch.equal(torch.rand(4), expected)
    assert not list(tmp_path.glob(".*"))


def test_stored_tensors_are_a_mapping_that_reads_on_demand(tmp_path: Path) -> None:
    stored = cp.load_engine_state(save(tmp_path, 1))
    assert set(stored) == set(engine_state())
    assert len(stored) == len(engine_state())
    assert "nobody" not in stored
    with pytest.raises(KeyError):
        stored["nobody"]


def test_a_run_whose_checkpoints_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    cp.check_room(tmp_path, free // 4, keep=2, saves=10)
    with pytest.raises(PreflightError, match=r"3 checkpoints of .* pass --keep-checkpoints 1"):
        cp.check_room(tmp_path, free // 2, keep=2, saves=10)
    cp.check_room(tmp_path, free // 2, keep=2, saves=1)


def names() -> list[str]:
    return ["engine.safetensors", "rng.safetensors", "loop.json", "adapter/adapter_model.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_is_seen_and_the_file_named(tmp_path: Path, name: str, how: str) -> None:
    path = save(tmp_path, 3) / name
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    if name == "manifest.json" and how == "flipped":
        path.write_bytes(content.replace(b'"sha256"', b'"sha255"', 1))
    with pytest.raises(cp.CheckpointDamaged, match=Path(name).name.replace(".", r"\.")) as caught:
        cp.validate(tmp_path / "checkpoint-3")
    assert caught.value.exit_code == ExitCode.FAILURE


def test_the_one_before_is_taken_and_the_damage_is_told(tmp_path: Path) -> None:
    for step in (10, 20, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-100" / "engine.safetensors").write_bytes(b"short")
    said: list[str] = []
    assert cp.newest_valid(tmp_path, said.append) == tmp_path / "checkpoint-20"
    assert len(said) == 1
    assert "engine.safetensors has 5 bytes" in said[0]
    assert (tmp_path / "checkpoint-100.damaged").is_dir()
    assert [p.name for p in cp.checkpoints_of(tmp_path)] == ["checkpoint-20", "checkpoint-10"]


def test_no_good_checkpoint_at_all(tmp_path: Path) -> None:
    assert cp.newest_valid(tmp_path, print) is None
    (save(tmp_path, 10) / "manifest.json").write_text("[]")
    with pytest.raises(cp.CheckpointDamaged, match="No checkpoint in"):
        cp.newest_valid(tmp_path, lambda text: None)


def test_a_full_disk_leaves_nothing_under_a_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(cp, "write_safetensors", full)
    with pytest.raises(SparktuneError, match="No room left while writing the checkpoint of step 2") as caught:
        save(tmp_path, 2)
    assert caught.value.exit_code == ExitCode.FAILURE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


def test_the_kernel_refusing_to_grow_a_file_is_told_as_no_room(tmp_path: Path) -> None:
    """The same with a real refusal of the operating system: files may not grow past 64 KiB."""
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from sparktune.training.checkpoint import LoopState, save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    state = {'big': torch.zeros(50000)}\n"
        "    save_checkpoint(Path(sys.argv[1]), LoopState(step=4), state, lambda folder: None, 'adapter')\n"
        "except Exception as e:\n"
        "    print(type(e).__name__, e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("SparktuneError No room left while writing the checkpoint of step 4")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_named() -> None:
    with pytest.raises(PreflightError, match="/dev/null"):
        save(Path("/dev/null/run"), 1)


def test_rotation_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    assert [p.name for p in cp.rotate(tmp_path, 2, {5})] == ["checkpoint-10"]
    assert [p.name for p in cp.checkpoints_of(tmp_path)] == ["checkpoint-20", "checkpoint-15", "checkpoint-5"]


def test_an_existing_checkpoint_of_the_same_step_is_moved_not_mixed(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    (first / "adapter" / "stray").write_text("x")
    save(tmp_path, 5)
    cp.validate(tmp_path / "checkpoint-5")
    assert not (tmp_path / "checkpoint-5" / "adapter" / "stray").exists()
    assert (tmp_path / "checkpoint-5.superseded" / "adapter" / "stray").exists()


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-9.partial" / "adapter").mkdir(parents=True)
    (tmp_path / ".mine").mkdir()
    save(tmp_path, 3)
    cp.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", "checkpoint-3"]


def test_a_plan_with_other_numbers_is_refused_by_name(tmp_path: Path) -> None:
    saved = {"seed": 1, "learning_rate": 1e-4, "data": "abc"}
    cp.check_same_run(saved, dict(saved), tmp_path)
    with pytest.raises(SparktuneError, match=r"learning_rate was 0\.0001 and is now 0\.0002; seed was 1 and is now 2"):
        cp.check_same_run(saved, {**saved, "seed": 2, "learning_rate": 2e-4}, tmp_path)


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    there = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert listed == there - {"manifest.json"}
