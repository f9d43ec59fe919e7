"""llama.cpp's own programs, compiled once on this machine from the pinned sources and kept in the cache.

    python -m sparktune.setup.export.llama_build [--cuda-architectures 121a-real] [--jobs N]

The folder's name is a hash of everything that decides what is in it (commit, sources, options, programs, machine), so
another release builds its own beside it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.setup.export.llama_cpp import COMMIT, SDIST_SHA256, child_environment, run_child, unpack_whole
from sparktune.setup.export.stage import run_command
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.events import EventWriter, NullEvents
from sparktune.setup.plan.outfolder import check_free_space
from sparktune.setup.plan.rundir import cache_dir

__all__ = ["PROGRAMS", "Tools", "build_tools", "find_tools"]

PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-results", "llama-server")
"""What is built: the quantiser and what it may want, two programs that compare, and the server that answers."""

_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "OFF", "GGML_NATIVE": "OFF", "GGML_OPENMP": "OFF",
    "GGML_CCACHE": "OFF", "LLAMA_CURL": "OFF", "LLAMA_OPENSSL": "OFF", "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_APP": "OFF", "LLAMA_BUILD_UI": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_NUMBER": "0", "LLAMA_BUILD_COMMIT": COMMIT[:9],
}
# Argument parsing, templates and the server's JSON are half of the compilers' time and compute nothing: -O1 takes 57 to
# 73 % of -O3's time on them (g++ 12: arg.cpp 17.6 of 30.8 s, chat.cpp 8.5 of 11.7, server-context.cpp 17.7 of 26.9).
_LIGHTLY_OPTIMISED = """function(sparktune_compile_quickly)
  target_compile_options(llama-common PRIVATE -O1)
  target_compile_options(server-context PRIVATE -O1)
endfunction()
cmake_language(DEFER CALL sparktune_compile_quickly)
"""
_RECORD = "build.json"
# In our image the programs are compiled with CUDA while it is built; they lie there with the same record.
_BAKED = Path("/opt/llama.cpp")
_SPACE = 1200 * 2**20
_BYTES_A_JOB = 1.2 * 2**30
_STEP = re.compile(r"\[(\d+)/(\d+)\]")


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Compiled programs, each compared with its recorded hash when it was found."""

    folder: Path
    record: dict[str, Any]
    """build.json: commit, options, compiler, and the sha256 of each program."""

    def program(self, name: str) -> str:
        """Returns the path of one of PROGRAMS."""
        assert name in PROGRAMS
        return str(self.folder / "bin" / name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _options(cuda: str | None) -> dict[str, str]:
    return _OPTIONS | ({} if cuda is None else {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": cuda})


def _folder(cuda: str | None) -> Path:
    what = [COMMIT, SDIST_SHA256, _options(cuda), _LIGHTLY_OPTIMISED, PROGRAMS, platform.system(), platform.machine(),
            platform.libc_ver()]
    return cache_dir("llama.cpp") / f"tools-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"


def _read(folder: Path) -> Tools | None:
    """Returns the programs in `folder`; None where there are none of this commit."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("commit") != COMMIT or not {*PROGRAMS} <= {*record["sha256"]}:
        return None
    for name in PROGRAMS:
        program = folder / "bin" / name
        if not program.is_file() or _sha256(program) != record["sha256"][name]:
            raise SparktuneError(
                f"{program} should be the program that was built there (its hash is in {folder / _RECORD}); it is "
                "missing or has changed. Remove that folder and start again: it will be built anew."
            )
    return Tools(folder=folder, record=record)


def find_tools() -> Tools | None:
    """Returns the compiled programs where they are there already, otherwise None.

    Raises:
        SparktuneError: a program was changed since it was built.
    """
    return _read(_BAKED) or _read(_folder(None))


def _executable(name: str, why: str, fix: str) -> str:
    """Returns a build tool: the one beside this Python, which pip installed, or the machine's."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise PreflightError(f"llama.cpp's programs have to be compiled once on this machine; {why}. {fix}")
    return found


def _toolchain() -> tuple[str, str, str]:
    """Returns cmake, ninja and the C++ compiler, or says what is missing before anything is fetched."""
    named = os.environ.get("CXX", "").split(" ")[0]
    names = [named] if named else ["c++", "g++", "clang++"]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise PreflightError(
            "llama.cpp's programs (for k-quants, and to prove a file in llama.cpp itself) have to be compiled once on "
            f"this machine, and there is no C++ compiler ({', '.join(names)}). Install one: sudo apt-get install g++. "
            "Or ask for types that need none: --gguf bf16,q8_0."
        )
    pip = "Install it: pip install cmake ninja."
    return (_executable("cmake", "cmake is missing", pip), _executable("ninja", "ninja is missing", pip), compiler)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lets one process build at a time; the others wait and find the result."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("a")
    except OSError as error:
        raise PreflightError(f"{folder.parent} cannot be written: {error.strerror}. Set XDG_CACHE_HOME.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _jobs() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / _BYTES_A_JOB)))


def _run(command: list[str], scratch: Path, events: EventWriter, what: str) -> str:
    """Runs one build command, its steps as progress."""
    log = scratch / "child.log"

    def report() -> None:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            steps = _STEP.findall(file.read().decode("utf-8", "replace"))
        done, total = steps[-1] if steps else (0, 0)
        events.progress("building llama.cpp", int(done), int(total) or None, "files")

    done = run_child(command, child_environment(scratch, scratch), scratch, report)
    if done.code:
        print(done.output, flush=True)
        lines = [line.strip() for line in done.output.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise SparktuneError(
            f"llama.cpp ({COMMIT[:9]}) could not be compiled, {what} failed: {said} The whole output is in the log. "
            "The merged model is complete; --gguf bf16,q8_0 needs no compiler."
        )
    return done.output


def build_tools(events: EventWriter, *, cuda: str | None = None, jobs: int | None = None) -> Tools:
    """Returns the compiled programs, building them at the first use: some minutes of all cores, said before.

    Args:
        events: progress, and what was built.
        cuda: architectures of a CUDA build (`121a-real` for GB10); None for the CPU alone.
        jobs: compilers at once; by cores and memory when left out.

    Raises:
        PreflightError: no compiler, no build tool, no space, or the sources cannot be fetched.
        SparktuneError: the compiler refused the sources.
    """
    there = (find_tools() if cuda is None else None) or _read(_folder(cuda))
    if there is not None:
        return there
    folder = _folder(cuda)
    cmake, ninja, compiler = _toolchain()
    with _only_one(folder):
        there = _read(folder)
        if there is not None:
            return there
        check_free_space(folder, _SPACE, "Building llama.cpp")
        jobs = jobs or _jobs()
        events.message(f"llama.cpp's programs are compiled once ({compiler}, {jobs} at a time; about 25 minutes of one "
                       f"core); they will be in {folder}.")
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as private:
            scratch = Path(private)
            sources, build, ready = unpack_whole(scratch, events), scratch / "build", scratch / "ready"
            added = scratch / "lightly.cmake"
            added.write_text(_LIGHTLY_OPTIMISED, encoding="utf-8")
            flags = [f"-D{key}={value}" for key, value in _options(cuda).items()]
            flags += [f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={added}"]
            flags += ["-DCMAKE_EXE_LINKER_FLAGS=-s"] if platform.system() == "Linux" else []
            _run([cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}",
                  "-S", str(sources), "-B", str(build), *flags], scratch, events, "its configuration")
            _run([ninja, "-C", str(build), "-j", str(jobs), *PROGRAMS], scratch, events, "the build")
            (ready / "bin").mkdir(parents=True)
            for name in PROGRAMS:
                shutil.copy2(build / "bin" / name, ready / "bin" / name)
            shutil.copy2(sources / "LICENSE", ready)
            record = {"commit": COMMIT, "options": _options(cuda), "compiler": compiler,
                      "machine": f"{platform.system()} {platform.machine()}",
                      "sha256": {name: _sha256(ready / "bin" / name) for name in PROGRAMS}}
            (ready / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.rename(ready, folder)
        events.message(f"llama.cpp's programs ({', '.join(PROGRAMS)}) are in {folder / 'bin'}.")
    tools = _read(folder)
    assert tools is not None
    return tools


class _Lines(NullEvents):
    """Events as lines on standard error, for the command."""

    _shown = -1

    def emit(self, kind: Any, **fields: Any) -> None:
        """Shows messages, and progress by whole percent."""
        if kind == "message":
            print(fields["text"], file=sys.stderr, flush=True)
        if kind == "progress" and fields.get("total"):
            percent = 100 * fields["done"] // fields["total"]
            if percent != self._shown:
                self._shown = percent
                print(f"{fields['phase']}: {fields['done']}/{fields['total']} {fields['unit']}", file=sys.stderr,
                      flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the programs and prints their folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.llama_build", description=__doc__)
    parser.add_argument("--cuda-architectures", metavar="ARCH", help="build with CUDA for these, e.g. 121a-real")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at once")
    args = parser.parse_args(argv)
    return run_command(lambda: print(build_tools(_Lines(), cuda=args.cuda_architectures, jobs=args.jobs).folder))


if __name__ == "__main__":
    sys.exit(main())
