"""train.py as users start it: published command lines, documented exit codes, sentences instead of tracebacks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.training.runs import open_request
from sparktune.training.session import run_session

pytestmark = pytest.mark.xdist_group("train-processes")

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (
    "--mode lora --train-data {data} --num-epochs 3 --per-device-batch-size 1 --gradient-accumulation 16 "
    "--max-seq-length 16384 --pack --pack-length 5120 --save-steps 200"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its data, and a cache."""
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "model", vocab_size=512, dtype="float32")
    write_smoke(folder / "train.jsonl")
    return folder


@pytest.fixture
def session(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs one training session in this process, in `tmp_path`; signal handlers are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(config: Path | None = None, **flags: Any) -> int:
        base = {"model": str(place / "model"), "data": place / "train.jsonl", "mode": "lora", "max_steps": 1,
                "lora_r": 2, "pack_length": 128, "tensorboard": False, "sample_prompts": ["Hello"]}
        given = {k: v for k, v in {**base, **flags}.items() if v is not None} if config is None else flags
        try:
            return int(run_session(given, config, {}))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run


def start(place: Path, cwd: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python train.py` as a process, the package not installed: only the sources are there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place / "cache"), **env}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )


def test_the_published_command_trains(place: Path, tmp_path: Path) -> None:
    """Verbatim but for the model, which is a tiny one; --data's path is the test's."""
    command = shlex.split(PUBLISHED.format(data=place / "train.jsonl"))
    done = start(place, tmp_path, *command, SPARKTUNE_MODEL=str(place / "model"))
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "results").iterdir()
    assert run.name.startswith("lora-2")
    assert len(run.name) == len("lora-2026-01-31-120000")
    there = {p.name for p in run.iterdir() if not p.name.startswith(".")}
    assert there == {"plan.yaml", "metrics.jsonl", "samples.jsonl", "stages", "log.txt", "data", "tensorboard",
                     "adapter", "checkpoint-2", "checkpoint-3"} or "adapter" in there
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (run / "adapter").iterdir()}
    plan = load_plan(run / "plan.yaml")
    assert (plan.gradient_accumulation, plan.pack_length, plan.max_seq_length) == (16, 5120, 16384)
    assert plan.save_steps == 200
    assert plan.kernels
    assert plan.origins["learning_rate"] == "recommendation"
    assert json.loads((run / "data" / "report.json").read_text())["rows"] == 50
    kinds = {json.loads(line)["kind"] for line in (run / "stages" / "train.ndjson").read_text().splitlines()}
    assert {"choice", "metric", "progress", "message", "artifact", "sample"} <= kinds


def test_both_published_resume_forms_parse(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "results" / "lora-2026-01-31-120000"
    (run / "checkpoint-1200").mkdir(parents=True)
    shutil.copy(place / "train.jsonl", tmp_path)
    plan = {"name": run.name, "mode": "lora", "data": str(tmp_path / "train.jsonl"), "lora_r": 8}
    (run / "plan.yaml").write_text(yaml.safe_dump(plan))
    for path, checkpoint in ((run / "checkpoint-1200", run / "checkpoint-1200"), (run, None)):
        request = open_request({"resume_from_checkpoint": path, "mode": "lora"}, None, {})
        assert request.checkpoint == checkpoint
        assert request.existing is not None
        assert request.existing.root == run
        assert (request.plan.lora_r, request.plan.name) == (8, run.name)


def test_the_folder_kernels_never_poses_as_a_package(place: Path, tmp_path: Path) -> None:
    """From the root and from elsewhere, with PYTHONPATH naming the root too."""
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as e:\n"
        "    assert not e.code\n"
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        f"assert spec is None or not str(spec.origin).startswith({str(ROOT / 'kernels')!r}), spec\n"
    )
    for cwd in (ROOT, tmp_path):
        done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--train-data" in done.stdout


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ({"engine": "unsloth"}, 3, "--engine unsloth needs the Unsloth engine"),
        ({"mode": "qlora", "quantise_base": "none"}, 2, "--quantise-base none"),
        ({"mode": "full", "quantise_base": "nf4"}, 2, "--mode full trains every weight"),
        ({"recompute_layers": 2}, 2, "--recompute-layers should be 1 to"),
        ({"optimizer": "adamw_8bit"}, 3, "--optimizer adamw_8bit needs a CUDA GPU"),
        ({"device": "cuda"}, 3, "--device cuda needs a CUDA GPU"),
        ({"data": None}, 2, "--train-data is missing"),
        ({"data": "/nowhere/rows.jsonl"}, None, "/nowhere/rows.jsonl"),
        ({"model": "/nowhere/model"}, 2, "/nowhere/model"),
        ({"results": "/proc/nowhere"}, 3, "/proc/nowhere"),
        ({"resume_from_checkpoint": Path("/nowhere/checkpoint-3")}, 2, "there is no such folder"),
        ({"target_modules": ["q_projection"]}, 2, "q_projection"),
        ({"name": "../x"}, 2, "--name"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    session: Callable[..., int], capfd: pytest.CaptureFixture[str], flags: dict[str, Any], code: int | None, says: str,
) -> None:
    returned = session(**flags)
    err = capfd.readouterr().err
    assert returned == code or (code is None and returned in (2, 3, 4))
    assert says in err
    assert "Traceback" not in err
    assert not list(Path("results").glob("*/adapter"))


def test_an_unknown_architecture_is_named_with_the_known_families(
    session: Callable[..., int], place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    config = {**config["text_config"], "model_type": "gpt_strange"}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    assert session(model=str(tmp_path / "odd")) == 3
    err = capfd.readouterr().err
    assert "gpt_strange" in err
    assert "qwen3_5_text, qwen2, qwen3, llama, mistral" in err


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "empty"), (b"\xff\xfe not json\n" * 3, "bad.jsonl"), (b'{"a": 1}\n' * 3, "bad.jsonl")]
)
def test_data_that_cannot_be_used_exits_4_and_names_the_file(
    session: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert session(data=tmp_path / "bad.jsonl") == 4
    err = capfd.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "results").exists()


def test_a_signal_before_the_first_step_is_no_abort(
    session: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparktune.training.session.probe", lambda model: os.kill(os.getpid(), signal.SIGTERM))
    assert session() == 75
    assert "before the first step" in capfd.readouterr().err


def test_a_missing_shard_is_named(
    session: Callable[..., int], place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "model", tmp_path / "holey")
    shard = sorted((tmp_path / "holey").glob("model-*.safetensors"))[1]
    shard.unlink()
    assert session(model=str(tmp_path / "holey")) == 3
    assert shard.name in capfd.readouterr().err


def test_a_taken_name_is_refused_and_a_traceback_goes_to_the_log(
    session: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session(name="first") == 0
    kept = (tmp_path / "results" / "first" / "metrics.jsonl").read_bytes()
    assert session(name="first") == 2
    assert "There is already a run named first" in capfd.readouterr().err
    assert (tmp_path / "results" / "first" / "metrics.jsonl").read_bytes() == kept

    def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody expected this")

    monkeypatch.setattr("sparktune.training.session.run_length", broken)
    assert session(name="second") == 1
    err = capfd.readouterr().err
    assert "Training failed unexpectedly (ZeroDivisionError: nobody expected this)" in err
    assert "Traceback" not in err
    assert "Traceback" in (tmp_path / "results" / "second" / "log.txt").read_text()


def test_a_run_whose_folder_is_there_is_started(session: Callable[..., int], place: Path, tmp_path: Path) -> None:
    from sparktune.setup.plan.config import resolve, save_plan

    run = tmp_path / "results" / "mine"
    run.mkdir(parents=True)
    flags = {"model": str(place / "model"), "data": place / "train.jsonl", "mode": "lora", "max_steps": 2, "lora_r": 2,
             "pack_length": 128, "name": "mine", "tensorboard": False, "save_steps": 1, "results": run.parent}
    save_plan(resolve(flags, {}, {}, {}), run / "plan.yaml")
    assert session(config=run / "plan.yaml") == 0
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert not (run / "log.txt").exists()  # the parent writes it
    first = (run / "metrics.jsonl").read_bytes()
    assert session(config=run / "plan.yaml") == 0  # finished already: nothing is trained again
    assert (run / "metrics.jsonl").read_bytes() == first


def test_a_config_that_is_not_a_runs_own_starts_a_new_run(place: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"data": str(place / "train.jsonl"), "lora_r": 3}))
    request = open_request({"lora_alpha": 6.0}, tmp_path / "plan.yaml", {"SPARKTUNE_SEED": "5"})
    assert request.existing is None
    assert (request.plan.lora_r, request.plan.lora_alpha, request.plan.seed) == (3, 6.0, 5)
    with pytest.raises(UsageError, match="no such file"):
        open_request({}, tmp_path / "other.yaml", {})


def test_a_resume_cannot_rename_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "plan.yaml").write_text(yaml.safe_dump({"name": "run", "data": "x.jsonl"}))
    with pytest.raises(SparktuneError, match="cannot rename the run run"):
        open_request({"resume_from_checkpoint": run / "checkpoint-1", "name": "other"}, None, {})
    with pytest.raises(SparktuneError, match=r"holds no plan\.yaml"):
        open_request({"resume_from_checkpoint": tmp_path}, None, {})


def test_a_number_of_layers_is_trained_with_and_kept_in_the_plan(session: Callable[..., int]) -> None:
    assert session(recompute="layer", recompute_layers=2, name="mixed") == 0
    plan = load_plan(Path("results/mixed/plan.yaml"))
    assert plan.recompute_choice == "layer:2"
    assert plan.origins["recompute_layers"] == "flag"
    assert Path("results/mixed/adapter/adapter_model.safetensors").is_file()


def test_the_static_flags_select_the_native_engine(tmp_path: Path) -> None:
    data = tmp_path / "x.jsonl"
    for flag, mode in (("static_lora", "lora"), ("wrap_full_ft", "full")):
        plan = open_request({flag: True, "data": data}, None, {}).plan
        assert (plan.engine, plan.mode) == ("native", mode)


def test_two_processes_cannot_train_one_run(
    session: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    assert session(name="busy") == 0
    with (tmp_path / "results" / "busy" / ".train.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert session(config=tmp_path / "results" / "busy" / "plan.yaml") == 3
    assert "Another process is training the run busy" in capfd.readouterr().err
