"""Storage that refuses, and folders whose writer was killed: a sample of lab/storage_faults.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparktune.lab.storage_faults import WORKS, faults_of, full_disks_of
from sparktune.setup.plan import outfolder
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.outfolder import build_folder, remove_unfinished


@pytest.mark.parametrize("name", ["checkpoint", "adapter"])
def test_an_operation_that_fails_costs_nothing_that_was_there(name: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trials, wrong = faults_of(WORKS[name], tmp_path, every=3)
    torch.set_num_threads(threads)
    assert wrong == []
    assert trials >= 3


def test_a_full_disk_costs_nothing_that_was_there(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trials, wrong = full_disks_of(WORKS["checkpoint"], tmp_path, sizes=4)
    torch.set_num_threads(threads)
    assert (trials, wrong) == (4, [])


def build(folder: Path) -> None:
    with build_folder(folder, needs_bytes=1, what="It", replace=lambda _: True) as partial:
        (partial / "file").write_text("new")


@pytest.mark.parametrize("at", ["marked", "unmarked", "ready", "between"])
def test_a_kill_between_any_two_lines_bars_no_ones_way(tmp_path: Path, at: str) -> None:
    folder = tmp_path / "out"
    if at == "marked":
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / ".sparktune-partial").touch()
    elif at == "unmarked":
        (tmp_path / "out.partial").mkdir()
    else:
        (tmp_path / ".out.sparktune-ready").mkdir()
        (tmp_path / ".out.sparktune-ready" / "file").write_text("half")
    if at == "between":  # the old one has stepped aside, the new one has not taken its name
        (tmp_path / ".out.sparktune-old").mkdir()
        (tmp_path / ".out.sparktune-old" / "file").write_text("old")
        remove_unfinished(folder)
        assert (folder / "file").read_text() == "old"
    build(folder)
    assert (folder / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(UsageError, match="was not made by this program"):
        build(tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").is_file()


def test_an_old_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "out")
    (tmp_path / "out" / "file").write_text("old")
    rename = outfolder.os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out" and "ready" in Path(source).name:
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(outfolder.os, "rename", failing)
    with pytest.raises(PreflightError, match="cannot be written"):
        build(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
