"""Storage that refuses: every operation on a file fails once, and disks of every size fill up.

    python -m sparktune.lab.storage_faults --out docs/results/reliability.csv

What is written: a checkpoint, a trained adapter, a merged model (its shards), a GGUF. For each, its operations on files
are counted (opens for writing, renames, folders, removals, fsyncs), then it is tried once for each with that operation
failing (EIO), and on full filesystems of 24 sizes (a tmpfs where this user may mount one, else a limit on a file's
size). After each trial: the refusal was a sentence and no traceback; what has a final name is whole; the checkpoint
before still loads; and the same work succeeds when storage works again.
"""

from __future__ import annotations

import argparse
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sparktune.lab.forked import fork_call, watch_files
from sparktune.lab.reliability import reliability_row
from sparktune.lab.table import append_rows
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.outfolder import build_folder
from sparktune.training.checkpoint import LoopState, checkpoints_of, newest_valid, save_checkpoint, validate

__all__ = ["WORKS", "Work", "faults_of", "full_disks_of", "main"]

_CHANGES = frozenset({"os.rename", "os.mkdir", "os.link", "os.truncate"})
"""Audited events that count, beside opens for writing. Removals clean up after a failure, so they are let through."""
_SENTENCE, _OTHER = 10, 11
_SIZES = 24


class FailAt:
    """Makes the n-th operation on files below a folder fail in this process, as a broken device does.

    Args:
        root: the folder.
        number: which operation fails, from 1; 0 only counts.
    """

    def __init__(self, root: Path, number: int) -> None:
        self._root, self._number, self.seen = str(root), number, 0

    def install(self) -> None:
        """Begins; it cannot be taken back, so this process must be a fork."""
        watch_files(self._root, _CHANGES, self._count)

    def _count(self, what: str) -> None:
        self.seen += 1
        if self.seen == self._number:
            raise OSError(errno.EIO, os.strerror(errno.EIO), what)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something that is written."""

    name: str
    write: Callable[[Path], None]
    """Writes it below a folder."""
    check: Callable[[Path], None]
    """Raises AssertionError where something below the folder has a final name and is not whole."""
    begin: Callable[[Path], None] = lambda folder: None
    """Lays what must survive."""


def _state() -> dict[str, torch.Tensor]:
    return {f"tensor.{i}": torch.full((97, 113), float(i)) for i in range(4)}


def _export(folder: Path) -> None:
    with build_folder(folder, needs_bytes=1, what="The adapter", replace=lambda _: True) as partial:
        save_file({"a": torch.ones(60, 70)}, partial / "adapter_model.safetensors")
        (partial / "adapter_config.json").write_text("{}", encoding="utf-8")


def _save(folder: Path, step: int) -> None:
    save_checkpoint(folder, LoopState(step=step, position=step), _state(), _export, "adapter")


def _check_checkpoints(folder: Path) -> None:
    for checkpoint in checkpoints_of(folder):
        validate(checkpoint)
    newest = newest_valid(folder, lambda text: None)
    assert newest is not None, "the checkpoint before is gone"
    assert not list(folder.glob("*.damaged")), "a damaged checkpoint had a final name"


def _check_adapter(folder: Path) -> None:
    if (folder / "adapter").exists():
        assert torch.equal(load_file(folder / "adapter" / "adapter_model.safetensors")["a"], torch.ones(60, 70))
        assert (folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8") == "{}"
    assert not (folder / "adapter" / ".sparktune-partial").exists()


WORKS = {
    "checkpoint": Work(name="checkpoint", write=lambda folder: _save(folder, 2), check=_check_checkpoints,
                       begin=lambda folder: _save(folder, 1)),
    "adapter": Work(name="adapter", write=lambda folder: _export(folder / "adapter"), check=_check_adapter),
}
"""What needs no model. `works_of_models` adds the merged model and the GGUF."""


def works_of_models(place: Path) -> dict[str, Work]:
    """Returns the works that start from a model: its merge with an adapter, and its GGUF.

    Args:
        place: takes the tiny model, its adapter and the reference results.
    """
    from sparktune.setup.demo import make_model
    from sparktune.setup.export.gguf_export import export_gguf
    from sparktune.setup.export.merge import merge
    from sparktune.setup.plan.events import NullEvents
    from sparktune.setup.plan.models import probe

    tiny = make_model(place / "tiny", vocab_size=512, dtype="float32")
    adapter, spec = place / "adapter", probe(str(tiny))
    adapter.mkdir()
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    save_file({f"{prefix}.lora_A.weight": torch.ones(2, spec.intermediate_size),
               f"{prefix}.lora_B.weight": torch.ones(spec.hidden_size, 2)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"], "bias": "none"}')
    makers: dict[str, Callable[[Path], object]] = {
        "shard": lambda folder: merge(tiny, adapter, folder / "shard", NullEvents(), replace=lambda _: True),
        "gguf": lambda folder: export_gguf(tiny, folder / "gguf", ["f32"], "tiny", NullEvents(),
                                           replace=lambda _: True),
    }
    works = {}
    for name, make in makers.items():
        reference = place / f"reference-{name}"
        reference.mkdir()
        make(reference)
        works[name] = Work(name=name, write=lambda folder, make=make: void(make(folder)),
                           check=lambda folder, name=name, reference=reference: _same(folder / name, reference / name))
    return works


def void(_: object) -> None:
    """Takes what a maker returns."""


def _same(found: Path, reference: Path) -> None:
    if not found.exists():
        return
    expected = {str(p.relative_to(reference)): p for p in reference.rglob("*") if p.is_file()}
    there = {str(p.relative_to(found)): p for p in found.rglob("*") if p.is_file()}
    assert there.keys() == expected.keys(), f"{found} lacks or has too much: {there.keys() ^ expected.keys()}"
    for name, path in there.items():
        if path.suffix in (".safetensors", ".gguf"):
            assert path.read_bytes() == expected[name].read_bytes(), f"{path} is not whole"


def _try(work: Work, folder: Path, before: Callable[[], None], said: Path) -> int:
    """Does the work in a fork after `before`. Returns 0, or how it failed; what it said is in `said`."""

    def call() -> int:
        before()
        try:
            work.write(folder)
        except SparktuneError as error:
            text, code = str(error), _SENTENCE
        except BaseException as error:
            text, code = f"{type(error).__name__}: {error}", _OTHER
        else:
            return 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(text, file=sys.stderr)
        said.write_text(text, encoding="utf-8")
        return code

    return os.waitstatus_to_exitcode(os.waitpid(fork_call(call, new_session=False), 0)[1])


def _judge(work: Work, folder: Path, code: int, said: Path, what: str) -> list[str]:
    wrong = []
    if code not in (0, _SENTENCE):
        wrong.append(f"{what}: not a sentence: {said.read_text(encoding='utf-8') if said.exists() else code}")
    try:
        work.check(folder)
    except (AssertionError, SparktuneError, OSError, ValueError) as error:
        wrong.append(f"{what}: afterwards: {error}")
    return wrong


def faults_of(work: Work, place: Path, every: int = 1) -> tuple[int, list[str]]:
    """Fails each operation of a work once. Returns (trials, what was wrong).

    Args:
        work: what is written.
        place: an empty folder.
        every: only each n-th operation.
    """
    counted, total = place / "count", 0
    number, wrong = 0, list[str]()
    while number <= total:
        folder, said = place / f"{work.name}-{number}", place / "said"
        folder.mkdir(parents=True)
        said.unlink(missing_ok=True)
        work.begin(folder)
        fault = FailAt(folder, number)
        if number == 0:
            counting = Work(name=work.name, check=work.check,
                            write=lambda f, fault=fault: _counted(work, f, fault, counted))
            code = _try(counting, folder, fault.install, said)
            total = int(counted.read_text()) if counted.exists() else 0
        else:
            code = _try(work, folder, fault.install, said)
        wrong += _judge(work, folder, code, said, f"{work.name}, operation {number} of {total} failing")
        wrong += _again(work, folder, code, said, number)
        shutil.rmtree(folder)
        number += 1 if number == 0 else every
    return (total - 1) // every + 1, wrong


def _counted(work: Work, folder: Path, fault: FailAt, counted: Path) -> None:
    work.write(folder)
    counted.write_text(str(fault.seen))


def _again(work: Work, folder: Path, code: int, said: Path, number: int) -> list[str]:
    """Does the work once more, now that storage works: nothing that was left may be in the way."""
    if code == 0:
        return []
    again = _try(work, folder, lambda: None, said)
    wrong = _judge(work, folder, again, said, f"{work.name} again after operation {number} failed")
    return wrong + ([f"{work.name} again after {number}: {said.read_text(encoding='utf-8')}"] if again else [])


@contextmanager
def _small(place: Path, size: int) -> Iterator[bool]:
    """Mounts a tmpfs of `size` bytes on `place`; gives False where this user may not."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False,
                             capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def full_disks_of(work: Work, place: Path, sizes: int = _SIZES) -> tuple[int, list[str]]:
    """Does the work on disks that are too small. Returns (trials, what was wrong).

    The program's own prediction of space is switched off, so that the disk itself refuses.
    """
    from sparktune.setup.plan import outfolder

    trial = place / f"{work.name}-whole"
    trial.mkdir(parents=True)
    work.begin(trial)
    before = sum(p.stat().st_size for p in trial.rglob("*") if p.is_file())
    assert _try(work, trial, lambda: None, place / "said") == 0, "the work fails on a disk with room"
    whole = sum(p.stat().st_size for p in trial.rglob("*") if p.is_file())
    wrong: list[str] = []
    for number in range(sizes):
        folder, said = place / f"{work.name}-full", place / "said"
        folder.mkdir()
        said.unlink(missing_ok=True)
        room = before + (whole - before) * number // sizes + 16 * 4096
        with _small(folder, room) as mounted:
            work.begin(folder)

            def unpredicted(room: int = room, mounted: bool = mounted) -> None:
                outfolder.check_free_space = lambda *_: None
                if not mounted:
                    most = max(1, room // 4)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

            code = _try(work, folder, unpredicted, said)
            wrong += _judge(work, folder, code, said, f"{work.name} on {room} bytes")
        shutil.rmtree(folder)
    shutil.rmtree(trial)
    return sizes, wrong


def main(argv: list[str] | None = None) -> int:
    """Runs everything. Returns 0 when nothing was wrong, else 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m sparktune.lab.storage_faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*WORKS, "shard", "gguf"], action="append", help="only this; repeatable")
    parser.add_argument("--out", type=Path, help="append rows to this CSV")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    failed = 0
    with tempfile.TemporaryDirectory(prefix="sparktune-faults-") as folder:
        place = Path(folder)
        (place / "models").mkdir()
        works = WORKS if args.only and set(args.only) <= set(WORKS) else WORKS | works_of_models(place / "models")
        for work in (work for name, work in works.items() if name in (args.only or works)):
            for what, tries in (("failing operations", faults_of), ("full filesystems", full_disks_of)):
                began = time.monotonic()
                trials, wrong = tries(work, place / f"{work.name}-{what[:4]}")
                failed += len(wrong)
                print(f"{work.name}: {trials} {what}, {len(wrong)} wrong", *wrong, sep="\n    ", flush=True)
                if args.out is not None:
                    append_rows(args.out, [reliability_row(
                        f"storage: {work.name}, {what}", "sparktune.lab.storage_faults", arguments, trials=trials,
                        failures=len(wrong), seconds=time.monotonic() - began,
                    )])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
