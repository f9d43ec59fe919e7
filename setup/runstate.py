"""What a run has done: state.json, the run's lock, and the fingerprints that let a resume skip finished stages."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.untrusted import excerpt, is_figure, json_object_file

__all__ = [
    "DATA_FIELDS", "EVALUATION_FIELDS", "RESUME_FIELDS", "STAGES", "RunLock", "RunState", "fingerprint", "outputs_of",
    "stage_input", "stages_of",
]

STAGES = ("prepare", "train", "merge", "mtp", "gguf", "evaluate", "report")
"""Stages in their order."""
_SMALL_BYTES = 2**20
DATA_FIELDS = (
    "model", "data", "eval_data", "eval_split", "text_field", "thinking", "max_seq_length", "over_length",
    "bad_row_limit", "dedupe", "redact_pii",
)
EVALUATION_FIELDS = ("eval_prompts", "validator", "baseline", "eval_checkpoints")
"""Fields that say how a finished run is judged: `evaluate RUN` may give them anew."""
MTP_FIELDS = ("mtp", "mtp_head", "mtp_epochs", "mtp_learning_rate")
RESUME_FIELDS = ("on_bad_step", "loss_spike", "gpus", "peers", *MTP_FIELDS, "gguf")
"""Fields that `resume RUN` may give anew: what follows a bad step, who trains (a step is the same step on any number of
GPUs), and what is made of the merged model.

A stop at a bad step and a base without a head advise just that; a finished run goes through the stages they change."""
_NOT_MATHS = (
    "name", "results", "output", "backend", "stack", "resume_from_checkpoint", "schema_version", "origins",
    "ranks", "kernels", "tracker", "tracker_project", "trial", "calibrate",
    *RESUME_FIELDS, *EVALUATION_FIELDS,
)
_FIELDS: dict[str, tuple[str, ...]] = {"mtp": MTP_FIELDS, "gguf": ("gguf",), "evaluate": EVALUATION_FIELDS}


def stages_of(plan: Plan) -> tuple[str, ...]:
    """Returns the stages that `plan` asks for, in order."""
    if plan.trial:
        return ("prepare", "train", "report")
    skipped = {"mtp"} if plan.mtp == "skip" else set()
    return tuple(s for s in STAGES if s not in (skipped if plan.gguf else skipped | {"gguf"}))


def outputs_of(stage: str, run: RunDir, plan: Plan) -> list[Path]:
    """Returns what must exist, unchanged, for `stage` to count as done."""
    return {
        "prepare": [run.data_report],
        "train": [run.weights if plan.mode == "full" else run.adapter, run.metrics],
        "merge": [run.merged],
        # a base without a head leaves no folder: then the stage's own word for it is what it made
        "mtp": [run.served_mtp(plan.mtp) or run.stage_events("mtp")],
        "gguf": [run.gguf],
        "evaluate": [run.samples],
        "report": [run.report, run.summary],
    }[stage]


def fingerprint(paths: Iterable[Path]) -> str | None:
    """Returns a hash of all files in `paths`, or None where one is missing.

    Small files count by content, so that a stage that writes the same again does not make later ones run again; large
    ones by size and time: a model has tens of gigabytes, and every writer of ours replaces files by rename.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not path.exists():
            return None
        # a card is written anew when more has been measured; the model beside it is the same
        files = [path] if path.is_file() else sorted(
            p for p in path.rglob("*") if p.is_file() and p.name != "README.md")
        for file in files:
            stat = file.stat()
            name = file.name if path.is_file() else str(file.relative_to(path))
            small = stat.st_size <= _SMALL_BYTES
            mark = hashlib.sha256(file.read_bytes()).hexdigest() if small else f"{stat.st_size} {stat.st_mtime_ns}"
            digest.update(f"{name}\0{mark}\n".encode())
    return digest.hexdigest()


def stage_input(stage: str, plan: Plan, before: Iterable[str]) -> str:
    """Returns a hash of what `stage` depends on.

    Args:
        stage: the stage.
        plan: the run's plan; only the fields that matter to the stage count.
        before: output hashes of the stages before it.
    """
    fields: tuple[str, ...] = _FIELDS.get(stage, ())
    if stage == "prepare":
        fields = DATA_FIELDS
    elif stage == "train":
        fields = tuple(f for f in Plan.model_fields if f not in _NOT_MATHS)
    values = plan.model_dump(mode="json", include=set(fields))
    sources: list[str | None] = []
    if stage == "prepare":
        sources = [fingerprint([p]) for p in (plan.data, plan.eval_data) if p is not None]
        model = Path(plan.model)
        sources.append(fingerprint([model]) if model.is_dir() else plan.model)
    text = json.dumps([stage, values, sources, list(before)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """Returns stage -> entry of a state.json; raises ValueError for anything else."""
    stages = json_object_file(path).get("stages")
    if not isinstance(stages, dict):
        raise ValueError("`stages` is no object")
    for name, entry in stages.items():
        seconds = entry.get("seconds") if isinstance(entry, dict) else None
        if name not in STAGES or seconds is None or not is_figure(seconds):
            raise ValueError(f"the entry {excerpt(name)} is none of a stage")
    return stages


class RunState:
    """state.json: stage -> input hash, output hash, seconds. Written by the pipeline only, atomically.

    Args:
        run: the run.

    Raises:
        UsageError: the file is there and is not what the pipeline wrote.
    """

    def __init__(self, run: RunDir) -> None:
        self._path = run.state
        self._stages: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            try:
                self._stages = _entries(self._path)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"{self._path} is damaged ({error}). Remove it to run every stage again; finished training is kept "
                    "in the run folder."
                ) from error

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Finished stages."""
        return dict(self._stages)

    def done(self, stage: str, input_hash: str, output_hash: str | None) -> bool:
        """Returns whether `stage` finished with this input and its output is still what it was."""
        entry = self._stages.get(stage, {})
        return output_hash is not None and entry.get("input") == input_hash and entry.get("output") == output_hash

    def finish(self, stage: str, input_hash: str, output_hash: str | None, seconds: float) -> None:
        """Records that `stage` ended well."""
        self._stages[stage] = {"input": input_hash, "output": output_hash, "seconds": round(seconds, 3)}
        self._save()

    def begin(self, stage: str) -> None:
        """Forgets `stage`: from now until `finish` it counts as not done."""
        if self._stages.pop(stage, None) is not None:
            self._save()

    def _save(self) -> None:
        partial = self._path.with_name(f".{self._path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"stages": self._stages}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._path)


class RunLock:
    """Holds a run for one pipeline at a time. The stages inherit it, so an orphaned training still holds it.

    Raises:
        PreflightError: another process works on the run, or the folder cannot be written.
    """

    def __init__(self, run: RunDir) -> None:
        self._path = run.root / ".lock"
        try:
            self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise PreflightError(f"{run.root} cannot be written: {error.strerror}. Make it writable.") from error
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.fd)
            raise PreflightError(
                f"Another process is working on the run {run.name}. Wait for it, or stop it first (Ctrl-C there)."
            ) from None

    def close(self) -> None:
        """Lets go of the run; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
