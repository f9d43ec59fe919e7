"""What a plan asks of the stages after the training is refused before the training, not after it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparktune.setup.plan.config import resolve, save_plan
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.exports import check_exports
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import ModelSpec, Plan

SPEC = ModelSpec.model_construct(hidden_size=8)


def head(path: Path, hidden: int = 8, name: str = "mtp.fc.weight") -> str:
    save_file({name: np.zeros((hidden, 2 * hidden), np.float32)}, path)
    return str(path)


def test_a_head_that_is_not_there_or_of_another_size_is_refused(tmp_path: Path) -> None:
    def asked(given: str, mtp: str = "trained") -> Plan:
        return Plan(model="a/b", mtp=mtp, mtp_head=given, gguf=[])

    with pytest.raises(UsageError, match=r"--mtp-head /no/such should be .* there is no such file or folder"):
        check_exports(asked("/no/such"), SPEC)
    check_exports(asked("/no/such", "skip"), SPEC)
    check_exports(asked("Qwen/Qwen3.5-2B"), SPEC)
    check_exports(asked(head(tmp_path / "good.safetensors")), SPEC)
    with pytest.raises(UsageError, match=r"another size: its mtp.fc.weight has 16 rows.* hidden size is 8"):
        check_exports(asked(head(tmp_path / "wide.safetensors", 16)), SPEC)
    check_exports(asked(str(tmp_path / "wide.safetensors")))
    folder = tmp_path / "model"
    folder.mkdir()
    head(folder / "model.safetensors", 16)
    with pytest.raises(UsageError, match="another size"):
        check_exports(asked(str(folder)), SPEC)
    head(folder / "model.safetensors", 8, "lm_head.weight")
    with pytest.raises(UsageError, match=r"holds no mtp.fc.weight: it has no MTP head"):
        check_exports(asked(str(folder)), SPEC)


def test_a_baseline_must_be_a_finished_run(tmp_path: Path) -> None:
    plan = Plan(model="a/b", gguf=[], baseline="old", results=tmp_path / "results", output=tmp_path / "output")
    with pytest.raises(UsageError, match=r"--baseline old should name a run"):
        check_exports(plan)
    run = RunDir(name="old", results_root=plan.results, output_root=plan.output)
    run.root.mkdir(parents=True)
    save_plan(plan, run.plan)
    with pytest.raises(UsageError, match=r"holds no merged model. Finish that run first: ./run.sh resume old"):
        check_exports(plan)
    run.merged.mkdir(parents=True)
    (run.merged / "config.json").write_text("{}")
    check_exports(plan)


def test_a_validator_must_be_a_program_here_and_its_files_are_found_from_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(model="a/b", gguf=[], backend="local", validator=["/no/such", "x"])
    with pytest.raises(UsageError, match=r"--validator '/no/such' is no program here"):
        check_exports(plan)
    check_exports(plan.model_copy(update={"backend": "docker"}))  # the image has programs of its own
    monkeypatch.chdir(tmp_path)
    judge = tmp_path / "judge.py"
    judge.write_text("")
    shutil.copy("/bin/true", tmp_path / "true")
    found = resolve({"validator": ["true", "judge.py", "--strict", "none.txt"]}, {}, {}, {}).validator
    assert found == ["true", str(judge), "--strict", "none.txt"], "a bare program is PATH's, not the folder's"
    assert resolve({"validator": ["./true"]}, {}, {}, {}).validator == [str(tmp_path / "true")]
