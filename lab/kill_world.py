"""The uninterrupted run of lab/kill_matrix.py: made, kept stage by stage, and what other runs are compared with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparktune.lab.forked import FileOperations, ForkedProcess, ForkingSubprocess, be_new_process, fork_call
from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.machine.backends import MODULES
from sparktune.setup.plan.rundir import cache_dir

__all__ = ["NAME", "Session", "World", "alive", "hashes", "kill_group", "make_world"]

NAME = "one"
PATIENCE_S = 1200.0
_ROWS = 24
_COMMON = {
    "--backend": "local", "--engine": "native", "--mode": "lora", "--name": NAME, "--max-steps": "6",
    "--save-steps": "2", "--keep-checkpoints": "2", "--learning-rate": "1e-2", "--pack-length": "128", "--lora-r": "4",
    "--lora-dropout": "0.1", "--gradient-accumulation": "2",
}
_SIZES = {
    "whole": {"--eval-steps": "3", "--sample-steps": "6", "--eval-split": "0.15", "--eval-prompts": "1",
              "--mtp": "trained", "--mtp-epochs": "1", "--mtp-learning-rate": "1e-3", "--gguf": "f32,bf16"},
    "small": {"--eval-split": "0", "--eval-prompts": "0", "--mtp": "default", "--gguf": "none"},
}
_WITH_PATHS = ("manifest.json", "README.md", "Modelfile")
"""Files that name the folder they were made in; they are compared themselves, the folder's name replaced."""
_VOLATILE = re.compile(r"(_s|seconds|tok_per_s|_gib|time|date|made|started|finished|peak|disk|memory)$")
"""Keys of summary.json whose values are times and loads of the machine."""


@dataclass(kw_only=True)
class World:
    """The uninterrupted run, its state before every stage, and what trials are compared with."""

    folder: Path
    size: str
    """whole, or small: no GGUF, no answers, the base's MTP head."""
    files: dict[str, str] = field(default_factory=dict)
    """Path below a run's place -> hash of what must be the same."""
    seconds: dict[str, float] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the run, in order."""
        return tuple(self.seconds)

    def arguments(self) -> list[str]:
        """Returns the command line of the run."""
        paths = {"--data": str(self.folder / "data.jsonl"), "--model": str(self.folder / "tiny")}
        options = {**paths, **_COMMON, **_SIZES[self.size]}
        return ["--non-interactive", *(word for pair in options.items() for word in pair), "--no-tensorboard"]

    def describe(self) -> str:
        """Returns the reference run in words."""
        took = ", ".join(f"{s} {t:.1f} s ({self.operations.get(s, 0)} file operations)" for s, t in
                         self.seconds.items())
        return f"{took}; {len(self.files)} files to compare"


def make_world(folder: Path, *, size: str = "whole", by_exec: bool = False) -> World:
    """Makes model, data and the uninterrupted run, twice: what differs between the two cannot be compared.

    Args:
        folder: to work in; made.
        size: see `World.size`.
        by_exec: make it a third time with real processes and hold it against the forked one.

    Raises:
        RuntimeError: the run failed, or two uninterrupted runs differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder=folder, size=size)
    if not (folder / "tiny").is_dir():
        pid = fork_call(lambda: _ingredients(folder), new_session=False)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the tiny model could not be made")
    _share_converter(folder / "cache")
    first, second = folder / "first", folder / "second"
    for place in (first, second):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        session = Session(world, place, snapshots=place is second)
        code = session.run(world.arguments())
        if code != 0:
            session.end_all()
            raise RuntimeError(f"the uninterrupted run failed with {code}:\n{session.said()[-3000:]}")
    state = json.loads((second / "results" / NAME / "state.json").read_text())["stages"]
    world.seconds = {stage: float(entry["seconds"]) for stage, entry in state.items()}
    for path in second.glob("operations-*"):
        world.operations[path.name.removeprefix("operations-")] = int(path.read_text())
    one, other = hashes(first), hashes(second)
    differing = sorted(p for p in one.keys() | other.keys() if one.get(p) != other.get(p))
    if differing:
        raise RuntimeError(f"two uninterrupted runs differ: {', '.join(differing)}")
    world.files = other
    if by_exec:
        _compare_with_exec(world)
    return world


def _ingredients(folder: Path) -> int:
    make_model(folder / "tiny", vocab_size=512, dtype="float32")
    write_smoke(folder / "all.jsonl")
    rows = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines()[:_ROWS]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return 0


def _share_converter(cache: Path) -> None:
    """Links the converter's sources; without llama.cpp's programs a file is read back and not run."""
    target = cache / "sparktune" / "llama.cpp"
    target.mkdir(parents=True, exist_ok=True)
    sources = cache_dir("llama.cpp")
    for entry in sources.iterdir() if sources.is_dir() else ():
        if not entry.name.startswith(("tools-", ".")) and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


def _compare_with_exec(world: World) -> None:
    place = world.folder / "by-exec"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    env = {**os.environ, **Session(world, place).environment()}
    argv = [sys.executable, "-P", "-m", "sparktune.setup.cli", *world.arguments()]
    done = subprocess.run(argv, cwd=place, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run of real processes failed with {done.returncode}:\n{done.stderr[-3000:]}")
    found = hashes(place)
    differing = sorted(p for p in found.keys() | world.files.keys() if found.get(p) != world.files.get(p))
    if differing:
        raise RuntimeError(f"a run of real processes differs from the forked one: {', '.join(differing)}")
    print(f"A run of real processes gives the same bits in all {len(found)} files.", flush=True)


# -- processes


class Session:
    """The parent process of one run, and the processes it starts."""

    def __init__(self, world: World, place: Path, *, snapshots: bool = False, fatal: tuple[str, int] | None = None,
                 own_cache: bool = False) -> None:
        self.world, self.place, self._snapshots, self._fatal = world, place, snapshots, fatal
        self._cache = place / "cache" if own_cache else world.folder / "cache"
        self.pid, self._master = 0, -1
        self.code: int | None = None
        (place / "tmp").mkdir(exist_ok=True)
        if own_cache:
            _share_converter(self._cache)

    def environment(self) -> dict[str, str]:
        """Returns what the run's environment has of its own."""
        return {"XDG_CACHE_HOME": str(self._cache), "TMPDIR": str(self.place / "tmp"), "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

    def start(self, arguments: list[str], *, terminal: bool = False) -> None:
        """Starts the program, in a terminal of its own where asked."""
        self.code = None
        if terminal:
            self._master, slave = os.openpty()
        else:
            slave = os.open(self.place / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.pid = fork_call(lambda: self._parent(arguments, slave, terminal))
        os.close(slave)
        if terminal:
            os.set_blocking(self._master, False)

    def _parent(self, arguments: list[str], out: int, terminal: bool) -> int:
        import fcntl
        import termios

        from sparktune.setup import cli
        from sparktune.setup.export import llama_cpp
        from sparktune.setup.machine import backends

        if terminal:
            fcntl.ioctl(out, termios.TIOCSCTTY, 0)
        be_new_process(out, stdin=out if terminal else None)
        os.chdir(self.place)
        os.environ.update(self.environment())
        for module in (backends, llama_cpp):
            module.subprocess = ForkingSubprocess()
        ForkedProcess.started, ForkedProcess.watch = self._note, self._watch
        if self._snapshots:
            self._keep_states()
        return cli.main(arguments)

    def _note(self, argv: list[str], pid: int) -> None:
        with (self.place / "started").open("a", encoding="utf-8") as file:
            file.write(f"{stage_of(argv)} {pid}\n")

    def _watch(self, argv: list[str]) -> FileOperations | None:
        stage = stage_of(argv)
        if stage == "child":
            return None
        counts = self.place / f"operations-{stage}" if self._snapshots else None
        fatal = self._fatal[1] if self._fatal and self._fatal[0] == stage else None
        return FileOperations(self.place, fatal, counts) if counts or fatal else None

    def _keep_states(self) -> None:
        """Copies the whole place after every stage: the state before the next one."""
        from sparktune.setup.plan.config import load_plan
        from sparktune.setup.runstate import RunState, stages_of

        finish, place, folder = RunState.finish, self.place, self.world.folder

        def kept(state: RunState, stage: str, *rest: Any) -> None:
            finish(state, stage, *rest)
            stages = stages_of(load_plan(place / "results" / NAME / "plan.yaml"))
            later = stages[stages.index(stage) + 1 :]
            if later:
                target = folder / f"before-{later[0]}"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(place, target, symlinks=True, ignore=shutil.ignore_patterns("operations-*", "tmp"))

        RunState.finish = kept

    def started(self) -> dict[str, int]:
        """Returns stage -> process id of what was started so far."""
        path = self.place / "started"
        lines = path.read_text().splitlines() if path.exists() else []
        return {line.split()[0]: int(line.split()[1]) for line in lines if len(line.split()) == 2}

    def poll(self) -> int | None:
        """Returns the exit code when the program has ended, and reads what it wrote on its terminal."""
        if self._master >= 0:
            with contextlib.suppress(OSError):  # nothing to read just now
                os.read(self._master, 65536)
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, patience_s: float = PATIENCE_S) -> int | None:
        """Waits for the end; None where it does not come."""
        deadline = time.monotonic() + patience_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.code

    def run(self, arguments: list[str]) -> int | None:
        """Starts the program and waits for its end."""
        self.start(arguments)
        return self.wait()

    def hang_up(self) -> None:
        """Closes the terminal."""
        os.close(self._master)
        self._master = -1

    def said(self) -> str:
        """Returns what the program wrote, where it had no terminal."""
        path = self.place / "said.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def end_all(self) -> None:
        """Kills whatever of this run still lives."""
        for pid in (self.pid, *self.started().values()):
            kill_group(pid, signal.SIGKILL)
        self.wait(10)
        if self._master >= 0:
            self.hang_up()


def stage_of(argv: list[str]) -> str:
    """Returns the stage that a command line runs, or `child` for a stage's own child."""
    if any(word.endswith("train.py") for word in argv):
        return "train"
    return next((stage for stage, module in MODULES.items() if module in argv), "child")


def kill_group(pid: int, number: int) -> None:
    """Sends a signal to a process group that may be gone."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def alive(pid: int) -> bool:
    """Says whether a process runs; one that nobody has waited for does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


# -- what is compared


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        own_paths = str(value.get("path", "")).endswith(_WITH_PATHS)  # so its size follows the length of the path
        return {k: _plain(v) for k, v in value.items()
                if not _VOLATILE.search(k) and not (own_paths and k in ("bytes", "sha256"))}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _rows(path: Path) -> bytes:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n".join(json.dumps(_plain(row), sort_keys=True) for row in rows).encode()


def _content(path: Path, place: re.Pattern[bytes]) -> bytes:
    """Returns what of a file must be the same: its bytes, but for paths of the run's place, times and loads."""
    if path.name == "metrics.jsonl":
        return _rows(path)
    if path.name in ("summary.json", "loop.json", "manifest.json") and "-gguf" not in str(path):
        plain = _plain(json.loads(path.read_text(encoding="utf-8")))
        return place.sub(b"@", json.dumps(plain, sort_keys=True).encode())
    if path.name == "report.html":  # figures in it are summary.json's; here it must be whole
        return path.read_bytes().rstrip()[-7:]
    content = path.read_bytes()
    return content if path.suffix in (".safetensors", ".gguf") else place.sub(b"@", content)


_COMPARED = (
    f"results/{NAME}/adapter", f"results/{NAME}/metrics.jsonl", f"results/{NAME}/samples.jsonl",
    f"results/{NAME}/data", f"results/{NAME}/evaluation.json", f"results/{NAME}/judged",
    f"results/{NAME}/mtp/head.safetensors", f"results/{NAME}/mtp/acceptance.json", f"results/{NAME}/summary.json",
    f"results/{NAME}/report.html", "output",
)
# what a checkpoint restores; its loop.json and manifest hold byte lengths of logs, whose figures of speed vary
_OF_CHECKPOINTS = ("engine.safetensors", "rng.safetensors", "adapter/adapter_model.safetensors")


def _compared(place: Path) -> Iterator[Path]:
    for name in _COMPARED:
        path = place / name
        yield from (p for p in sorted(path.rglob("*")) if p.is_file()) if path.is_dir() else [path] * path.is_file()
    for folder in (f"results/{NAME}", f"results/{NAME}/mtp"):
        for checkpoint in sorted((place / folder).glob("checkpoint-*")):
            yield from (p for p in sorted(checkpoint.rglob("*.safetensors")) if p.is_file())


def hashes(place: Path, *, whole: bool = True) -> dict[str, str]:
    """Returns path -> hash of everything that two runs of one plan must have in common.

    Args:
        place: the folder that holds `results` and `output`.
        whole: the run ended; otherwise its logs, which grow line by line, and what is half built are left out.
    """
    paths = [p for p in _compared(place) if whole or (p.name != "metrics.jsonl" and ".partial" not in str(p))]
    # a trial's earlier stages ran elsewhere, in the reference's place
    places = re.compile(rb"/[^\s\"']*/(?:first|second|by-exec|trials/\d+)(?=/)")
    return {str(p.relative_to(place)): hashlib.sha256(_content(p, places)).hexdigest() for p in paths}
