"""The preflight: everything that can be known to go wrong before a run starts, checked in seconds."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sparktune.setup.machine import host_checks as host
from sparktune.setup.machine.backends import choose_backend, program_root
from sparktune.setup.machine.check import Check, failures, guarded
from sparktune.setup.machine.detect import existing_parent, host_memory_gib, nvidia_gpus
from sparktune.setup.machine.host_checks import hub_answers
from sparktune.setup.plan.errors import ExitCode, SparktuneError
from sparktune.setup.plan.exports import BYTES_PER_WEIGHT, check_exports, written_types
from sparktune.setup.plan.memory import adapter_parameters, checkpoint_bytes
from sparktune.setup.plan.models import is_adapter_folder, is_hub_id, probe, resolve_model_dir
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.weights import safetensors_index

__all__ = ["Check", "disk_by_stage", "disk_need_gib", "failures", "machine_checks", "run_checks"]

_GIB = 2**30
_MIN_MEMORY_GIB = 1.0


def disk_by_stage(plan: Plan, spec: ModelSpec, base_gib: float | None = None) -> dict[str, float]:
    """Predicts the disk space of a run: stage -> GiB it adds and that stays.

    Args:
        plan: the run; `auto` mode counts as LoRA.
        spec: the model's shape.
        base_gib: size of the base's weight files; two bytes a parameter when left out. An MTP folder hard-links them,
            so it adds next to nothing.
    """
    parameters_gib = spec.parameters / _GIB
    if plan.mode == "full":
        result = spec.parameters * 2
    else:
        result = adapter_parameters(spec, plan.lora_r or 32, plan.target_modules) * 4
    # one checkpoint more than are kept, while it is being written
    train = (result + checkpoint_bytes(plan, spec) * (plan.keep_checkpoints + 1)) / _GIB
    return {
        "train": train, "merge": parameters_gib * 2 if base_gib is None else base_gib,
        "gguf": sum(parameters_gib * BYTES_PER_WEIGHT.get(kind, 1.0) for kind in written_types(plan.gguf)),
    }


def disk_need_gib(plan: Plan, spec: ModelSpec, base_gib: float) -> float:
    """Predicts the disk space a run takes, in GiB: checkpoints, trained result, merged model, GGUF files."""
    return sum(disk_by_stage(plan, spec, base_gib).values())


def _python(plan: Plan) -> Check:
    # run.sh starts nothing older than 3.11, and nothing older could have imported this module
    return Check(name="python", status="ok", seen=f"{platform.python_version()} at {sys.executable}")


def _torch(plan: Plan) -> Check:
    if importlib.util.find_spec("torch") is not None:
        return Check(name="torch", status="ok", seen="importable here")
    if (program_root() / ".venvs" / "local" / ".stamp").is_file():
        return Check(name="torch", status="ok", seen="in the local environment, .venvs/local")
    return Check(
        name="torch", status="warning", seen="not installed yet",
        fix="The first run makes the local environment; do it now with scripts/venv.sh local.",
    )


def _backend(plan: Plan) -> Check:
    backend, reason = choose_backend(plan)
    return Check(name="backend", status="ok", seen=f"{backend.name} ({reason})")


def _gpu(plan: Plan) -> Check:
    gpus = nvidia_gpus()
    if not gpus:
        if plan.device == "cuda":
            return Check(
                name="gpu", status="failed", seen="no NVIDIA GPU answers",
                fix="Check `nvidia-smi`, or train with --device cpu.",
            )
        return Check(name="gpu", status="ok", seen="none; the CPU trains (small models only)")
    name, (major, minor), free = gpus[0]
    memory = "memory shared with the CPU" if free is None else f"{free:.1f} GiB free"
    return Check(name="gpu", status="ok", seen=f"{name}, compute capability {major}.{minor}, {memory}")


def _memory(plan: Plan) -> Check:
    free = host_memory_gib()
    if free < _MIN_MEMORY_GIB:
        return Check(
            name="memory", status="failed", seen=f"{free:.1f} GiB available",
            fix=f"At least {_MIN_MEMORY_GIB:.0f} GiB is needed to start; close other programs.",
        )
    return Check(name="memory", status="ok", seen=f"{free:.1f} GiB available")


def _hub_model(model: str) -> tuple[Path | None, bool]:
    """Returns the folder in the local cache that holds all of a hub model (or None), and whether the hub answers."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(model, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    if folder is not None:
        try:
            safetensors_index(folder)
        except SparktuneError:
            folder = None  # interrupted, or only its config was looked at
    return folder, hub_answers()


def _may_download(model: str) -> Check | None:
    """Returns a failed check where the hub refuses the model's files to this user, None where it does not."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.auth_check(model)
    except errors.GatedRepoError:
        return Check(
            name="model", status="failed", seen=f"{model} is gated, and this user has not been let in",
            fix=f"Accept its terms on its page ({huggingface_hub.constants.ENDPOINT}/{model}), then: hf auth login",
        )
    except errors.RepositoryNotFoundError:
        return Check(
            name="model", status="failed", seen=f"the hub knows no model {model}, or hides it from this user",
            fix="Check the spelling of --model; for a private model log in: hf auth login", exit_code=ExitCode.USAGE,
        )
    except (errors.HfHubHTTPError, OSError):
        return None  # the hub is unwell; the download itself will say so
    return None


def _model(plan: Plan) -> tuple[Check, ModelSpec | None]:
    """Checks the model, and returns its shape where that is known."""
    folder = Path(plan.model)
    if folder.is_dir():
        spec = probe(plan.model)
        size = f"{spec.model_type}, {spec.parameters / 1e9:.2f} B parameters"
        safetensors_index(resolve_model_dir(plan.model))
        where = "adapter folder; its base" if is_adapter_folder(folder) else "local folder"
        return Check(name="model", status="ok", seen=f"{where}: {size}"), spec
    if not is_hub_id(plan.model):
        probe(plan.model)  # neither a folder nor OWNER/NAME: says so
    cached, answers = _hub_model(plan.model)
    if cached is None and not answers:
        return Check(
            name="model", status="failed", seen=f"{plan.model} is neither in the local cache nor is the hub reachable",
            fix="Connect once, or give --model a folder that holds the model.",
        ), None
    if cached is None and (refused := _may_download(plan.model)):
        return refused, None
    spec = probe(str(cached) if cached else plan.model)
    where = "in the local cache" if cached else "on the hub, will be downloaded"
    seen = f"{plan.model} ({where}): {spec.model_type}, {spec.parameters / 1e9:.2f} B parameters"
    return Check(name="model", status="ok", seen=seen), spec


def _data(plan: Plan) -> Check:
    for flag, path in (("--data", plan.data), ("--eval-data", plan.eval_data)):
        if path is None:
            continue
        fix = f"Give {flag} a JSONL file that can be read."
        if not path.exists():
            return Check(name="data", status="failed", seen=f"{path} does not exist", fix=fix, exit_code=ExitCode.DATA)
        if not path.is_file():
            return Check(name="data", status="failed", seen=f"{path} is not a file", fix=fix, exit_code=ExitCode.DATA)
        if not os.access(path, os.R_OK):
            return Check(name="data", status="failed", seen=f"{path} may not be read", fix=fix, exit_code=ExitCode.DATA)
    if plan.data is None:
        return Check(name="data", status="ok", seen="none given yet")
    return Check(name="data", status="ok", seen=f"{plan.data}, {plan.data.stat().st_size / 2**20:.1f} MiB")


def _exports(plan: Plan, spec: ModelSpec | None) -> Check:
    check_exports(plan, spec)
    return Check(name="exports", status="ok", seen=f"GGUF {', '.join(plan.gguf) or 'none'}; MTP head {plan.mtp}")


TRACKER_PACKAGES = {
    "wandb": "'wandb>=0.21,<1'", "mlflow": "'mlflow-skinny>=3,<4' 'sqlalchemy>=2,<3' 'alembic>=1.13,<2'",
    "trackio": "'trackio>=0.4,<1'",
}
"""Tracker -> what to install, as the extras of pyproject.toml say it."""


def _tracker(plan: Plan) -> Check:
    if plan.tracker == "none" or importlib.util.find_spec(plan.tracker) is not None:
        return Check(name="tracker", status="ok", seen=plan.tracker)
    return Check(
        name="tracker", status="failed", seen=f"{plan.tracker} is not installed in {sys.prefix}",
        fix=f"{sys.executable} -m pip install {TRACKER_PACKAGES[plan.tracker]}; or leave out --tracker.",
    )


def _folders(plan: Plan) -> Check:
    for flag, path in (("--results", plan.results), ("--output", plan.output)):
        parent = existing_parent(path)
        fix = f"Make it writable, or choose another folder with {flag}."
        if not parent.is_dir():
            return Check(name="folders", status="failed", seen=f"{parent} is a file, not a folder", fix=fix)
        try:
            with tempfile.TemporaryFile(dir=parent) as probe_file:
                probe_file.write(b"x")
        except OSError as error:
            return Check(name="folders", status="failed", seen=f"{parent}: {error.strerror}", fix=fix)
    if plan.results.resolve() == plan.output.resolve():
        return Check(
            name="folders", status="failed", seen=f"{plan.results} is given as --results and as --output",
            fix="Both keep a folder named after the run; choose two different ones.", exit_code=ExitCode.USAGE,
        )
    return Check(name="folders", status="ok", seen=f"{plan.results} and {plan.output} can be written")


def _amount(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def _disk(plan: Plan, spec: ModelSpec | None) -> Check:
    if spec is None:
        return Check(name="disk", status="warning", seen="the need is not known: the model cannot be read")
    base_gib = spec.parameters * 2 / _GIB
    folder = Path(plan.model)
    if folder.is_dir():
        files = {p.resolve() for p in safetensors_index(resolve_model_dir(plan.model)).values()}
        base_gib = sum(p.stat().st_size for p in files) / _GIB
    stages = disk_by_stage(plan, spec, base_gib)
    need = sum(stages.values())
    # two roots may lie on two disks; each must hold all, which errs on the safe side
    free = min(shutil.disk_usage(existing_parent(p)).free for p in (plan.results, plan.output)) / _GIB
    parts = ", ".join(f"{stage} {_amount(gib)}" for stage, gib in stages.items())
    seen = f"{_amount(free)} free, this run writes about {_amount(need)} ({parts})"
    if free < need:
        return Check(
            name="disk", status="failed", seen=seen,
            fix="Free some space, choose other folders (--results, --output), or fewer files (--gguf none, "
            "--keep-checkpoints 1).",
        )
    return Check(name="disk", status="ok", seen=seen)


def machine_checks(plan: Plan) -> list[Check]:
    """Runs the checks that depend on this machine alone, not on model and data."""
    checks = [guarded(name, partial(check, plan)) for name, check in _MACHINE.items()]
    engine = [c.seen for c in checks if c.name == "engine" and c.status == "failed"]
    kept = [c for c in checks if c.name != "backend" or c.seen not in engine]  # one cause, one line
    if not plan.peers or plan.backend == "local":
        return kept
    from sparktune.setup.machine.peer_checks import peer_checks

    far = peer_checks(plan)
    causes = [c.seen for c in far if c.status == "failed"]
    return [*(c for c in kept if c.name != "backend" or c.seen not in causes), *far]


def run_checks(plan: Plan) -> list[Check]:
    """Runs every check on `plan`, in the order in which they are shown."""
    found: list[ModelSpec | None] = [None]

    def model(plan: Plan) -> Check:
        check, found[0] = _model(plan)
        return check

    asked: dict[str, Callable[[Plan], Check]] = {
        "model": model, "data": _data, "exports": lambda plan: _exports(plan, found[0]), "tracker": _tracker,
        "disk": lambda plan: _disk(plan, found[0]),
    }
    return [*machine_checks(plan), *(guarded(name, partial(check, plan)) for name, check in asked.items())]


_MACHINE: dict[str, Callable[[Plan], Check]] = {
    "os": host.check_os, "python": _python, "driver": host.check_driver, "gpu": _gpu, "clocks": host.check_clocks,
    "memory": _memory, "page cache": host.check_page_cache, "toolkit": host.check_toolkit,
    "engine": host.check_engine, "backend": _backend, "torch": _torch, "hub": host.check_hub,
    "token": host.check_token, "folders": _folders, "specs": host.check_specs, "packages": host.check_shadowed,
    "leftovers": host.check_leftovers,
}
