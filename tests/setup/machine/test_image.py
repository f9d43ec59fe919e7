"""What an image's tag stands for, what its pins hold, and how a build's output is read. No engine needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from sparktune.setup.arguments import parse
from sparktune.setup.build_progress import build_line
from sparktune.setup.export import llama_build, llama_cpp
from sparktune.setup.machine.backends import choose_backend
from sparktune.setup.machine.docker_backend import ImageOptions, container_options, mounts_of, needs_network
from sparktune.setup.machine.image import FLAVOURS, image_inputs, input_hash, load_stack, stacks
from sparktune.setup.machine.image_build import Progress, steps_of
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan

ROOT = Path(__file__).resolve().parents[3]
STACKS = ROOT / "docker" / "stacks"
PROTECTED = re.compile(r"(torch|torchvision|torchaudio|torchao|triton|numpy|setuptools|(nvidia|cuda)-.*)$")


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", path.read_text(encoding="utf-8"), flags=re.M))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("docker", "kernels", "mtp", "setup", "training", "src", "train.py", "pyproject.toml", "LICENSE"):
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, target)
    return tmp_path


@pytest.mark.parametrize("stack", stacks(ROOT))
def test_a_lock_is_exact_hashed_and_leaves_the_base_alone(stack: str) -> None:
    for file in ("requirements.lock", "fast-path.lock", "sources.lock"):
        text = (STACKS / stack / file).read_text(encoding="utf-8")
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
        entries = text.replace("\\\n", "").strip().splitlines()
        assert entries
        for entry in entries:
            assert re.match(r"^[a-z0-9._-]+==\S+(\s+--hash=sha256:[0-9a-f]{64})+\s*$", entry), entry[:120]
            assert not PROTECTED.match(entry.split("==")[0])


def test_the_published_pins_stay_as_published() -> None:
    found = pins(STACKS / "2026.05" / "requirements.lock") | pins(STACKS / "2026.05" / "fast-path.lock")
    published = {
        "unsloth": "2026.5.2", "unsloth-zoo": "2026.5.1", "transformers": "5.5.0", "trl": "0.24.0", "peft": "0.19.1",
        "datasets": "4.3.0", "bitsandbytes": "0.49.2", "flash-linear-attention": "0.5.0", "fla-core": "0.5.0",
        "tokenizers": "0.22.2", "dill": "0.4.0", "multiprocess": "0.70.16", "fsspec": "2025.9.0", "pandas": "2.3.3",
        "cut-cross-entropy": "25.1.1", "hf-transfer": "0.1.9",
    }
    assert {name: found.get(name) for name in published} == published
    assert load_stack(ROOT, "2026.05").base_image == "nvcr.io/nvidia/pytorch:26.03-py3"
    with pytest.raises(UsageError, match=r"2026\.05, 2026\.10"):
        load_stack(ROOT, "2025.01")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_hash_follows_every_input_and_nothing_else(tree: Path, flavour: str) -> None:
    def now(**arguments: str) -> str:
        return input_hash(tree, "2026.05", flavour, "sha256:base", arguments)

    first = now()
    assert now() == first
    (tree / "docker" / "README.md").write_text("other words", encoding="utf-8")
    (tree / "docker" / "stacks" / "2026.10" / "requirements.lock").write_text("", encoding="utf-8")
    (tree / "setup" / "__pycache__").mkdir(exist_ok=True)
    (tree / "setup" / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert now() == first
    assert now(MAX_JOBS="2") != first
    assert input_hash(tree, "2026.05", flavour, "sha256:other", {}) != first
    for name in ("docker/verify_base.py", "docker/stacks/2026.05/requirements.lock", "training/loop.py", "train.py"):
        path = tree / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert now() != first, name
        path.write_bytes(before)
    assert now() == first


def test_the_build_context_holds_every_input_and_ignores_the_rest() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    for flavour in FLAVOURS:
        for stack in stacks(ROOT):
            assert {path.parts[0] for path in image_inputs(ROOT, stack, flavour)} <= kept


def test_dockerfiles_build_without_buildkit() -> None:
    for name in FLAVOURS.values():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "syntax=" not in text
        assert "RUN --mount" not in text.split("\n", 3)[3]
        assert "USER 10001" in text
        assert text.rindex("ARG INPUT_HASH") > max(text.rindex("RUN "), text.rindex("COPY "))


def follow(lines: list[str], total: int, **more: Any) -> tuple[Progress, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    progress = Progress(total=total, on_event=events.append, **more)
    for line in lines:
        progress.feed(line)
    return progress, events


def test_both_builders_give_the_same_events() -> None:
    buildkit, a = follow([
        "#1 [internal] load build definition from Dockerfile", "#1 DONE 0.0s", "#4 [1/2] FROM base", "#4 DONE 0.1s",
        "#5 [2/2] RUN pip install x", "#5 1.5 Collecting x", "#5 ERROR: executor failed running: exit code: 41",
    ], 2)
    legacy, b = follow([
        '{"stream": "Step 1/2 : FROM base\\n"}', '{"stream": "Step 2/2 : RUN pip install x\\n"}',
        '{"stream": "Collecting x\\n"}', '{"errorDetail": {"code": 41}, "error": "returned a non-zero code: 41"}',
    ], 9)
    assert {key for event in a for key in event} == {key for event in b for key in event}
    assert (a[-1]["total"], b[-1]["total"]) == (2, 2)
    assert "RUN pip install x" in buildkit.step
    assert "RUN pip install x" in legacy.step
    assert "Collecting x" in buildkit.tail
    assert "Collecting x" in legacy.tail
    assert legacy.error == "returned a non-zero code: 41"


def test_remaining_time_comes_from_earlier_builds() -> None:
    lines = ["#4 [1/2] FROM base", "#4 DONE 0.1s", "#5 [2/2] RUN pip install x"]
    assert follow(lines, 2)[1][-1]["remaining_s"] is None
    known = {"[1/2] FROM base": 30.0, "[2/2] RUN pip install x": 90.0}
    last = follow(lines, 2, history=known)[1][-1]
    assert last["remaining_s"] == 90.0
    assert "step 2 of 2" in build_line(last)
    assert "about 1:30 left" in build_line(last)


def test_steps_are_counted_as_buildkit_does(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("FROM a AS x\nRUN b && \\\n    c\nFROM a\nCOPY d e\nENV f=g\nWORKDIR /h\n", encoding="utf-8")
    assert steps_of(path) == 4


def test_only_what_downloads_gets_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    local, hub = Plan(model=str(tmp_path)), Plan(model="Qwen/Qwen3.5-2B")
    assert [s for s in ("prepare", "train", "merge", "mtp", "gguf", "evaluate", "report") if needs_network(s, local)] \
        == ["gguf"]
    (tmp_path / "sparktune" / "llama.cpp" / "abc").mkdir(parents=True)
    assert not needs_network("gguf", local)
    assert needs_network("train", hub)
    assert not needs_network("report", hub)


def test_data_is_mounted_read_only_where_it_is(tmp_path: Path) -> None:
    data = tmp_path / "elsewhere" / "train.jsonl"
    data.parent.mkdir()
    data.write_text("", encoding="utf-8")
    run = RunDir(name="r", results_root=tmp_path / "results", output_root=tmp_path / "output")
    mounts = mounts_of(run, Plan(model="Qwen/Qwen3.5-2B", data=data, output=tmp_path / "output"))
    assert mounts[str(data.parent)] == "ro"
    assert mounts[str(run.root)] == "rw"
    assert mounts[str(tmp_path / "output")] == "rw"


def test_a_validators_script_is_mounted_and_the_systems_programs_are_the_images(tmp_path: Path) -> None:
    script = tmp_path / "checks" / "arithmetic.py"
    script.parent.mkdir()
    script.write_text("", encoding="utf-8")
    run = RunDir(name="r", results_root=tmp_path / "results", output_root=tmp_path / "output")
    plan = Plan(model="Qwen/Qwen3.5-2B", output=tmp_path / "output",
                validator=["/usr/bin/env", "python3", str(script), "--strict", str(tmp_path / "no-such-file")])
    mounts = mounts_of(run, plan)
    assert mounts[str(script.parent)] == "ro"
    assert not any(folder.startswith("/usr") for folder in mounts)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [([], 2, "usage"), (["--data"], 2, "needs a value"), (["--data", "/no/such", "--", "ls"], 2, "should be a folder"),
     (["--frobnicate"], 2, "no such flag")],
)
def test_run_sh_explains_wrong_use(arguments: list[str], code: int, says: str) -> None:
    done = subprocess.run([ROOT / "scripts" / "run.sh", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert says in done.stderr


def test_install_refuses_an_unknown_flag() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sparktune.setup.install", "--frobnicate"], capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 2


def test_the_smoke_test_prints_json_lines_and_says_what_needs_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "docker" / "smoke_test.py", "--only", "triton_kernel", "--only", "llama_cpp"],
        capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["check"]: row["status"] for row in rows} == {"triton_kernel": "skip", "llama_cpp": "skip"}
    assert done.returncode == 75


@pytest.mark.parametrize("name", [*FLAVOURS.values(), "docker/stub/Dockerfile"])
def test_hadolint_finds_nothing(name: str) -> None:
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([tool, ROOT / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_image_holds_what_our_package_declares() -> None:
    """Every stack has each of our own requirements at a version that pyproject.toml allows.

    torch is the base's; cmake and ninja compile what the image has compiled already.
    """
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(r) for r in (*declared["dependencies"], *declared["optional-dependencies"]["wizard"],
                                       *declared["optional-dependencies"]["train"])
              if not re.match(r"(torch|cmake|ninja)\b", r)]
    for stack in stacks(ROOT):
        found = {"numpy": "1.26.4", **pins(STACKS / stack / "requirements.lock")}
        for need in wanted:
            if need.marker is None or need.marker.evaluate({"platform_machine": "aarch64"}):
                assert need.specifier.contains(found[need.name.lower().replace("_", "-")]), f"{stack}: {need}"


def test_the_image_and_the_gguf_stage_mean_the_same_llama_cpp() -> None:
    lock = (STACKS / "llama-cpp.lock").read_text(encoding="utf-8")
    commit = re.findall(r"^# commit: ([0-9a-f]{40})$", lock, flags=re.M)
    assert commit == [llama_cpp.COMMIT]
    assert f"{llama_cpp.PACKAGE} --hash=sha256:{llama_cpp.SDIST_SHA256}\n" in lock
    assert set(llama_build.PROGRAMS) <= set(re.findall(
        r"llama-[a-z]+", re.findall(r"^programs=\((.*)\)$", (ROOT / "docker/build_llama.sh").read_text(), flags=re.M)[0]
    ))


def test_a_second_machine_and_a_token_change_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    token = tmp_path / "token"
    run = RunDir(name="r", results_root=tmp_path / "results", output_root=tmp_path / "output")
    engine = SimpleNamespace(networks=SimpleNamespace(list=lambda names: ["bridge"]))

    def options(stage: str, model: str) -> dict[str, Any]:
        return container_options(engine, stage, run, Plan(model=model, output=tmp_path / "output"), gpus=True,
                                 image="i", token=token, interface="enp1s0f0np0")

    train = options("train", "Qwen/Qwen3.5-2B")
    assert train["network_mode"] == "host"
    assert train["environment"]["NCCL_SOCKET_IFNAME"] == train["environment"]["GLOO_SOCKET_IFNAME"] == "enp1s0f0np0"
    assert train["volumes"][str(token)] == {"bind": "/run/secrets/hub", "mode": "ro"}
    assert train["device_requests"][0]["Capabilities"] == [["gpu"]]
    assert {u["Name"]: u["Soft"] for u in train["ulimits"]} == {"memlock": -1, "stack": 67108864}
    report = options("report", "Qwen/Qwen3.5-2B")
    assert report["network_mode"] == "none"
    assert str(token) not in report["volumes"]
    assert options("prepare", "Qwen/Qwen3.5-2B")["network_mode"] == "bridge"
    local = options("prepare", str(tmp_path))
    assert local["network_mode"] == "none"
    assert str(token) not in local["volumes"]


def test_what_is_wanted_of_an_image_needs_a_backend_with_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rebuild, --dev-mount is about the Docker image"):
        choose_backend(Plan(model=str(tmp_path), backend="local"), ImageOptions(rebuild="clean", dev_mount=True))
    assert choose_backend(Plan(model=str(tmp_path), backend="local"), ImageOptions())[0].name == "local"


@pytest.mark.parametrize(
    ("words", "rebuild", "command", "run"),
    [(["--rebuild", "resume", "r"], "yes", "resume", "r"), (["resume", "r", "--rebuild=clean"], "clean", "resume", "r"),
     (["--rebuild"], "yes", "run", None), ([], "no", "run", None), (["--rebuild", "clean"], "clean", "run", None)],
)
def test_rebuild_takes_a_value_only_where_one_is_meant(
    words: list[str], rebuild: str, command: str, run: str | None
) -> None:
    arguments = parse(words)
    assert (arguments.image.rebuild, arguments.command, arguments.run) == (rebuild, command, run)
