"""Checkpoints: `checkpoint-N/` appears whole, by rename, or not at all, and says when it was damaged afterwards.

A folder holds the trained result (`adapter/` or `weights/`, usable as it is), `engine.safetensors` (masters, moments,
generators of the engine), `rng.safetensors` (torch's own generators), `loop.json` (step, position in the data, byte
lengths of the logs, the settings that shape the mathematics) and `manifest.json` (size and sha256 of each file).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.outfolder import remove_unfinished
from sparktune.setup.plan.untrusted import excerpt, json_object_file, whole_number
from sparktune.training.spread import whole

__all__ = [
    "CheckpointDamaged",
    "LoopState",
    "StoredTensors",
    "check_room",
    "check_same_run",
    "checkpoints_of",
    "holds",
    "load_engine_state",
    "load_loop_state",
    "newest_valid",
    "remove_leftovers",
    "restore_rng",
    "rotate",
    "save_checkpoint",
    "set_aside",
    "storage_error",
    "sync_folder",
    "sync_tree",
    "validate",
    "write_safetensors",
]

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r"\.checkpoint-\d+\.partial")
_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
_SAFETENSORS_TYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}


class CheckpointDamaged(SparktuneError):
    """A checkpoint does not hold what its manifest promises."""


@dataclass(kw_only=True)
class LoopState:
    """What the loop itself remembers between steps."""

    step: int = 0
    """Optimiser steps done."""
    position: int = 0
    """Micro-batches consumed since the run began, over all epochs: the position in the data."""
    tokens: int = 0
    """Real tokens seen."""
    best_eval_loss: float | None = None
    best_step: int | None = None
    """Step of the lowest evaluation loss."""
    evals_without_gain: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of the last good steps; a spike is measured against them."""
    bad_in_a_row: int = 0
    """Steps passed over since the last good one."""
    passed_over: int = 0
    """Steps that nothing was learned from, or whose learning was taken back."""
    pending: bool = False
    """The stop came during this step's evaluation: a resume begins with it."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl after this step; a resume cuts the file there."""
    samples_bytes: int = 0
    """Length of samples.jsonl after this step."""
    save_bytes_per_s: float | None = None
    """How fast the checkpoint before this one was written; None where there was none."""
    maths: dict[str, Any] = field(default_factory=dict)
    """Every setting that changes the numbers; a resume refuses another value."""


_COUNTS = (
    "step", "position", "tokens", "evals_without_gain", "metrics_bytes", "samples_bytes", "bad_in_a_row", "passed_over",
)
_OTHERS: dict[str, tuple[type, ...]] = {
    "best_eval_loss": (float, int, NoneType), "best_step": (int, NoneType), "pending": (bool,), "maths": (dict,),
    "recent_losses": (list,), "save_bytes_per_s": (float, int, NoneType),
}


def storage_error(error: OSError, doing: str) -> SparktuneError:
    """Returns the sentence for a write that the file system refused.

    Args:
        error: what the system said.
        doing: what was being written, "the checkpoint of step 20 in results/x".
    """
    where = Path(error.filename) if error.filename else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SparktuneError(
            f"No room left while writing {doing} ({error.strerror}). Nothing half-written was left under a final name; "
            "free some space (older checkpoints, --keep-checkpoints 1) and resume."
        )
    place = f" at {where}" if where else ""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
        return PreflightError(
            f"Cannot write {doing}{place}: {error.strerror}. Choose a writable folder with --results, or change its "
            "permissions."
        )
    return SparktuneError(f"Writing {doing}{place} failed: {error.strerror or error}.")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes `tensors` in the safetensors format, one at a time, and fsyncs.

    Unlike the library's writer it accepts views and never holds more than one tensor on the host; of one whose rows
    are spread over ranks it gathers them, for which the other ranks must ask for it too, in the same order.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _SAFETENSORS_NAMES:
            raise ValueError(f"{name}: safetensors cannot hold {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little"))
        out.write(encoded)
        for tensor in tensors.values():
            flat = whole(tensor.detach()).to("cpu").contiguous().reshape(-1)
            if flat.numel():
                out.write(memoryview(flat.view(torch.uint8).numpy()))
        out.flush()
        os.fsync(out.fileno())


def sync_tree(folder: Path) -> None:
    """Forces every file and folder below `folder`, and the folder itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Forces a file's content, or a folder's entries (a rename in it), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rng_tensors() -> dict[str, torch.Tensor]:
    states = {"torch.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"torch.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return states


def restore_rng(checkpoint: Path) -> None:
    """Sets torch's CPU and CUDA generators to what they were at the checkpoint."""
    states = load_file(checkpoint / "rng.safetensors")
    torch.set_rng_state(states["torch.cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"torch.cuda.{i}" in states:
                torch.cuda.set_rng_state(states[f"torch.cuda.{i}"], i)


def save_checkpoint(
    run_root: Path, state: LoopState, engine_state: Mapping[str, torch.Tensor], export: Callable[[Path], None],
    result_name: str,
) -> Path:
    """Writes `checkpoint-N` (N = state.step) under `run_root` and returns its path.

    Args:
        run_root: the run folder.
        state: the loop's state.
        engine_state: `Engine.state()`.
        export: `Engine.export`; called with the folder that it makes for the trained result.
        result_name: name of that folder, `adapter` or `weights`.

    Raises:
        SparktuneError: the file system refused; nothing is left under the final name.
    """
    final = run_root / f"checkpoint-{state.step}"
    partial = run_root / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        export(partial / result_name)
        write_safetensors(partial / "engine.safetensors", engine_state)
        write_safetensors(partial / "rng.safetensors", _rng_tensors())
        (partial / "loop.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        files = {
            str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
            for p in sorted(partial.rglob("*")) if p.is_file()
        }
        manifest = {"format": FORMAT, "step": state.step, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync_tree(partial)
        if final.exists():
            set_aside(final, "superseded")
        partial.rename(final)
        sync_folder(run_root)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise storage_error(error, f"the checkpoint of step {state.step} in {run_root}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def set_aside(checkpoint: Path, why: str) -> Path:
    """Renames a checkpoint that no longer counts to `checkpoint-N.WHY` and returns the new path."""
    target = checkpoint.with_name(f"{checkpoint.name}.{why}")
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}.{why}-{number}")
    checkpoint.rename(target)
    return target


def checkpoints_of(run_root: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest step first."""
    found = [(int(m[1]), p) for p in run_root.glob("checkpoint-*") if p.is_dir() and (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _promised(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Returns file -> (size, sha256), as a checkpoint's manifest has them.

    Raises:
        CheckpointDamaged: there is no manifest of a checkpoint.
    """
    manifest_path = checkpoint / "manifest.json"
    if not manifest_path.is_file():
        raise CheckpointDamaged(f"{checkpoint} is not a complete checkpoint: it has no manifest.json.")
    try:
        manifest = json_object_file(manifest_path)
        files = {
            str(name): (whole_number(entry["bytes"], "a size"), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"{manifest_path} is damaged: it is not the manifest of a checkpoint.") from error
    if version != FORMAT:
        raise CheckpointDamaged(f"{checkpoint} has format {version}; this version reads format {FORMAT}.")
    return files


def validate(checkpoint: Path) -> None:
    """Compares a checkpoint with its manifest, byte for byte.

    Raises:
        CheckpointDamaged: names the first file that is missing, truncated or changed.
    """
    manifest_path, files = checkpoint / "manifest.json", _promised(checkpoint)
    for needed in ("engine.safetensors", "rng.safetensors", "loop.json"):
        if needed not in files:
            raise CheckpointDamaged(f"{manifest_path} is damaged: it does not list {needed}.")
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not _within(name):
            raise CheckpointDamaged(f"{manifest_path} is damaged: {excerpt(name)} is no file of a checkpoint.")
        if not path.is_file():
            raise CheckpointDamaged(f"{checkpoint} is damaged: {name} is missing.")
        seen = path.stat().st_size
        if seen != size:
            raise CheckpointDamaged(f"{checkpoint} is damaged: {name} has {seen} bytes, {size} were written.")
        if _sha256(path) != digest:
            raise CheckpointDamaged(f"{checkpoint} is damaged: the content of {name} changed after it was written.")


def holds(checkpoint: Path, result: Path) -> bool:
    """Says whether a trained result is, byte for byte, the one that a checkpoint has under the same name.

    Raises:
        CheckpointDamaged: the checkpoint has no manifest.
    """
    files = {name: facts for name, facts in _promised(checkpoint).items() if name.startswith(f"{result.name}/")}
    return bool(files) and all(
        (path := result.parent / name).is_file() and path.stat().st_size == size and _sha256(path) == digest
        for name, (size, digest) in files.items()
    )


def _within(name: str) -> bool:
    """Whether `name` is a path below a folder, spelled as `save_checkpoint` spells it."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and part.isprintable() for part in parts)


def newest_valid(run_root: Path, say: Callable[[str], None]) -> Path | None:
    """Returns the newest undamaged checkpoint, or None where there is none at all.

    Damaged ones are renamed to `checkpoint-N.damaged` and reported through `say`.

    Raises:
        CheckpointDamaged: there are checkpoints and every one is damaged.
    """
    last: CheckpointDamaged | None = None
    for checkpoint in checkpoints_of(run_root):
        try:
            validate(checkpoint)
        except CheckpointDamaged as error:
            last = error
            say(f"{error} It was renamed to {set_aside(checkpoint, 'damaged').name}; trying the one before.")
        else:
            return checkpoint
    if last is not None:
        raise CheckpointDamaged(f"No checkpoint in {run_root} can be resumed from. {last} Start a new run.")
    return None


def load_loop_state(checkpoint: Path) -> LoopState:
    """Reads the loop's state of a validated checkpoint.

    Raises:
        CheckpointDamaged: loop.json is not what `save_checkpoint` writes.
    """
    path = checkpoint / "loop.json"
    try:
        state = LoopState(**json.loads(path.read_text(encoding="utf-8")))
        for name in _COUNTS:
            whole_number(getattr(state, name), name)
        for name, kinds in _OTHERS.items():
            if type(getattr(state, name)) not in kinds:
                raise ValueError(f"{name} is a {type(getattr(state, name)).__name__}")
        if not all(type(loss) is float and math.isfinite(loss) for loss in state.recent_losses):
            raise ValueError("recent_losses holds something other than finite numbers")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is not the state of a training: {error}. Resume from another checkpoint."
                                ) from error
    return state


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, read one at a time: a full run's state is larger than what is left free.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads one tensor to the CPU."""
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns name -> (type, shape), read from the file's header."""
        found = {}
        for name in self._names:
            part = self._file.get_slice(name)
            found[name] = (_SAFETENSORS_TYPES[part.get_dtype()], tuple(part.get_shape()))
        return found

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)


def load_engine_state(checkpoint: Path) -> StoredTensors:
    """Opens the engine's state of a validated checkpoint."""
    return StoredTensors(checkpoint / "engine.safetensors")


def check_room(run_root: Path, one_bytes: int, keep: int, saves: int) -> None:
    """Refuses a run whose checkpoints cannot fit on the disk: `keep` of them and the one being written.

    Args:
        run_root: the run folder.
        one_bytes: size of one checkpoint.
        keep: checkpoints kept.
        saves: how many the run will write at most.

    Raises:
        PreflightError: less than that is free.
    """
    there = len(checkpoints_of(run_root))
    count = max(1, min(keep + 1, saves) - there)
    free = shutil.disk_usage(run_root).free
    if free < count * one_bytes:
        raise PreflightError(
            f"{count} checkpoints of {one_bytes / 2**30:.2f} GiB need {count * one_bytes / 2**30:.2f} GiB in "
            f"{run_root}, but {free / 2**30:.2f} GiB is free. Free some space, point --results at another disk, or "
            "pass --keep-checkpoints 1."
        )


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses to resume under settings that would change the numbers.

    Raises:
        SparktuneError: names each setting with its saved and its new value.
    """
    differing = [
        f"{name} was {saved.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)
    ]
    if differing:
        raise SparktuneError(
            f"{checkpoint} cannot be resumed with this plan, because the numbers would change: {'; '.join(differing)}. "
            "Give the saved values (or leave those flags out), or start a new run."
        )


def rotate(run_root: Path, keep: int, protected: set[int]) -> list[Path]:
    """Deletes all but the `keep` newest checkpoints and those of `protected` steps. Returns the deleted paths.

    Called right after a checkpoint was written, so the newest one is known to be good. A deleted folder loses its
    name first: an interrupted deletion leaves no damaged checkpoint behind.
    """
    deleted = []
    for checkpoint in checkpoints_of(run_root)[keep:]:
        if int(checkpoint.name.split("-")[1]) in protected:
            continue
        doomed = run_root / f".{checkpoint.name}.partial"
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        deleted.append(checkpoint)
    return deleted


def remove_leftovers(run_root: Path) -> None:
    """Deletes half-written checkpoints and files of a killed process; the caller holds the run."""
    remove_unfinished(run_root)
    for result in ("adapter", "weights"):
        for path in run_root.glob(f".{result}.*"):  # what the export builds, in names of its own
            shutil.rmtree(path, ignore_errors=True)
    for path in run_root.glob(".checkpoint-*.partial"):
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
