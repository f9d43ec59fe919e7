"""Fuzzes every reader of what came from elsewhere: `python -m sparktune.lab.fuzz --target all --executions N --seed S`.

Each target (lab/fuzz_targets.py) runs in processes of its own, led by coverage (atheris, which is libFuzzer), with
mutations that keep an input's outer shape. A finding is: an exception that is not one of ours, a broken promise, an
input that takes longer than --limit seconds, memory beyond --memory MiB, a write, a rename, a link or a new folder
outside the scratch folder, a process or a connection. The input that did it is kept in --found.

`--blind` needs no atheris: the same inputs' mutations without coverage, for machines without its wheels and for the
sample in the default tests. `TMPDIR=/dev/shm` spares the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from sparktune.lab.fuzz_targets import TARGETS, Target
from sparktune.lab.reliability import reliability_row
from sparktune.lab.table import append_rows

__all__ = ["main"]

_LONGEST_INPUT = 4096
_STRUCTURED = 0.6
_TAIL = 200
_FOUND = 77
"""Exit code of a process that found something: libFuzzer's own."""
_DONE = re.compile(r"number_of_executed_units: (\d+)")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of the interpreter that change a file system, with the argument that names the place.
_CHANGES = {
    "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.link": 1, "os.symlink": 1, "os.truncate": 0,
    "os.chmod": 0, "os.chown": 0, "os.utime": 0, "shutil.rmtree": 0, "shutil.move": 1, "os.setxattr": 0,
}
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
"pickle.find_class",
          "webbrowser.open")


class Escaped(BaseException):
    """The reader touched what it must not; no `except Exception` may swallow that."""


class _Guard:
    """Watches what the interpreter does while a check runs."""

    def __init__(self, scratch: Path) -> None:
        self._inside = (str(scratch.resolve()) + os.sep, os.devnull)
        self.watching = False
        self.seen: str | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in _NEVER:
            self._raise(f"{event} {arguments[:2]!r}")
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and not self._allowed(path):
                self._raise(f"open for writing: {path!r}")
        elif event in _CHANGES and not self._allowed(arguments[_CHANGES[event]]):
            self._raise(f"{event}: {arguments[_CHANGES[event]]!r}")

    def _allowed(self, path: Any) -> bool:
        if isinstance(path, int):  # a descriptor that was opened before, under these same rules
            return True
        return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(self._inside)

    def _raise(self, what: str) -> None:
        self.seen = what
        raise Escaped(what)


@dataclass(frozen=True, kw_only=True)
class _Limits:
    seconds: int
    memory_mib: int


class _TooLong(BaseException):
    """One input took longer than the limit."""


def _cap_memory(mib: int) -> None:
    """Caps the address space at what is in use now and `mib` more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 2**20, 64 * 2**20))


def _watched(check: Callable[[bytes], None], guard: _Guard) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        guard.watching = True
        try:
            check(data)
        finally:
            guard.watching = False
        if guard.seen is not None:  # it was swallowed on the way
            raise Escaped(guard.seen)

    return one


def _mutated(target: Target, rng: random.Random) -> bytes:
    data = rng.choice(target.seeds)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = target.mutation(rng, data)[:_LONGEST_INPUT]
    return data


# -- one process, one target


def _blind(target: Target, executions: int, seed: int, limits: _Limits, found: Path, scratch: Path) -> int:
    """Tries the seeds and mutations of them. Returns the exit code."""
    guard = _Guard(scratch)
    check = _watched(target.make(scratch), guard)
    _cap_memory(limits.memory_mib)

    def too_long(number: int, frame: FrameType | None) -> None:
        raise _TooLong(f"longer than {limits.seconds} s")

    signal.signal(signal.SIGALRM, too_long)
    rng = random.Random(f"{target.name} {seed}")
    met: set[str] = set()
    for number in range(executions):
        data = target.seeds[number] if number < len(target.seeds) else _mutated(target, rng)
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        guard.seen = None
        try:
            check(data)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} {place.filename} {place.lineno}"
            if kind not in met:  # one of each kind is enough to see
                met.add(kind)
                name = found / f"crash-{target.name}-{hashlib.sha256(data).hexdigest()[:16]}"
                name.write_bytes(data)
                traceback.print_exc()
                print(f"Input kept as {name}", file=sys.stderr)
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"stat::number_of_executed_units: {executions}", file=sys.stderr)
    return _FOUND if met else 0


def _guided(
    target: Target, executions: int, seed: int, limits: _Limits, found: Path, scratch: Path, corpus: Path
) -> None:
    """Runs libFuzzer, which ends the process itself."""
    import atheris

    with atheris.instrument_imports(include=["sparktune.setup", "sparktune.training.checkpoint", "yaml"]):
        check = _watched(target.make(scratch), _Guard(scratch))
    for number, data in enumerate(target.seeds):
        (corpus / f"seed-{target.name}-{number}").write_bytes(data)
    _cap_memory(limits.memory_mib)

    def mutator(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() > _STRUCTURED:
            return atheris.Mutate(data, max_size)
        return target.mutation(rng, data)[:max_size]

    atheris.Setup(
        [sys.argv[0], f"-runs={executions}", f"-seed={seed % 2**31 + 1}", f"-timeout={limits.seconds}",
         f"-rss_limit_mb={limits.memory_mib + 3072}", f"-max_len={_LONGEST_INPUT}", "-print_final_stats=1",
         "-use_value_profile=1", f"-artifact_prefix={found}{os.sep}", "-verbosity=1", str(corpus)],
        check, custom_mutator=mutator,
    )
    atheris.Fuzz()


def _child(asked: argparse.Namespace) -> int:
    target, limits = TARGETS[asked.target], _Limits(seconds=asked.limit, memory_mib=asked.memory)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        scratch, corpus = Path(folder) / "scratch", Path(folder) / "corpus"
        scratch.mkdir()
        corpus.mkdir()
        os.chdir(scratch)
        tempfile.tempdir = str(scratch)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        if asked.blind:
            return _blind(target, asked.executions, asked.seed, limits, asked.found, scratch)
        _guided(target, asked.executions, asked.seed, limits, asked.found, scratch, corpus)
    return 0


# -- the parent


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    target: str
    executions: int
    seconds: float
    failure: str


def _one(target: str, executions: int, seed: int, asked: argparse.Namespace) -> _Outcome:
    words = [
        sys.executable, "-P", "-m", "sparktune.lab.fuzz", "--child", "--target", target, "--executions",
        str(executions),
        "--seed", str(seed), "--limit", str(asked.limit), "--memory", str(asked.memory), "--found", str(asked.found),
        *(["--blind"] if asked.blind else []),
    ]
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        code = subprocess.run(words, stdout=log, stderr=log, check=False, env=_environment()).returncode
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
    done = _DONE.findall(text)
    tried = int(done[-1]) if done else 0
    failure = "" if code == 0 and tried >= executions else f"exit code {code}\n" + "\n".join(text.splitlines()[-_TAIL:])
    return _Outcome(target=target, executions=tried, seconds=time.monotonic() - started, failure=failure)


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparktune.lab.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="all",
    help="a reader; all shares --executions out")
    parser.add_argument("--executions", type=int, default=100_000, metavar="N", help="inputs, over all processes")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes at a time")
    parser.add_argument("--shards", type=int, default=1, metavar="K", help="processes a target, each with its own seed")
    parser.add_argument("--limit", type=int, default=10, metavar="S", help="seconds that one input may take")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="memory beyond what the imports need")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder of inputs that failed")
    parser.add_argument("--blind", action="store_true", help="without coverage; needs no atheris")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a row a target")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _jobs(asked: argparse.Namespace) -> list[tuple[str, int, int]]:
    names = list(TARGETS) if asked.target == "all" else [asked.target]
    whole = sum(TARGETS[n].share for n in names)
    jobs = []
    for name in names:
        each = max(1, round(asked.executions * TARGETS[name].share / whole / asked.shards))
        jobs += [(name, each, asked.seed * 1000 + shard) for shard in range(asked.shards)]
    return jobs


def main(argv: list[str] | None = None) -> int:
    """Fuzzes. Returns 0 where nothing was found."""
    words = sys.argv[1:] if argv is None else argv
    asked = _parser().parse_args(words)
    if not asked.blind and find_spec("atheris") is None:
        print("Coverage needs the package atheris (Linux on x86_64: make venv). Without it: --blind.", file=sys.stderr)
        return 2
    asked.found = asked.found.resolve()
    asked.found.mkdir(parents=True, exist_ok=True)
    if asked.child:
        return _child(asked)
    started = time.monotonic()
    with ThreadPoolExecutor(asked.workers) as pool:
        outcomes = list(pool.map(lambda job: _one(*job, asked), _jobs(asked)))
    for name in dict.fromkeys(o.target for o in outcomes):
        mine = [o for o in outcomes if o.target == name]
        tried, failures = sum(o.executions for o in mine), [o.failure for o in mine if o.failure]
        seconds = sum(o.seconds for o in mine)
        print(f"{name:12} {tried:9,} executions, {seconds:7.1f} s of processes, {len(failures)} failed", flush=True)
        for text in failures:
            print(text, flush=True)
        if asked.csv:
            append_rows(asked.csv, [reliability_row(
                f"fuzz {name}: {TARGETS[name].about}", "sparktune.lab.fuzz", words, trials=tried,
                failures=len(failures),
                seconds=seconds,
            )])
    total = sum(o.executions for o in outcomes)
    failed = sum(bool(o.failure) for o in outcomes)
    print(f"{total:,} executions in {time.monotonic() - started:.1f} s, {failed} processes of {len(outcomes)} failed")
    if not any(asked.found.iterdir()):
        asked.found.rmdir()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
