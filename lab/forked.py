"""Python processes by fork instead of exec, so that hundreds of runs can be killed in the time of a few imports.

A child gets its own process group, working folder, environment, signal handlers and standard streams, closes every
descriptor that exec would have closed, and runs the module or script of its command line. What it skips is the start of
an interpreter and its imports; whatever it does after that is the program as users start it.
"""

from __future__ import annotations

import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["FileOperations", "ForkedProcess", "ForkingSubprocess", "fork_call", "preload", "watch_files"]

_PRELOADED = (
    "numpy", "torch", "torch.utils.tensorboard", "safetensors.torch", "transformers", "jinja2", "yaml", "rich.console",
    "rich.progress", "rich.table", "sparktune.setup.cli", "sparktune.setup.data.tokenise", "sparktune.training.session",
    "sparktune.training.engine_choice", "sparktune.setup.export.merge", "sparktune.setup.export.train_mtp_step",
    "sparktune.mtp.choose", "sparktune.setup.export.gguf", "sparktune.setup.export.evaluate",
    "sparktune.setup.export.generate", "sparktune.setup.report", "transformers.models.qwen3_5.modeling_qwen3_5",
)
# events of Python's audit hooks that change a folder; `open` counts where it writes
_CHANGES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"})


def preload() -> None:
    """Imports what stages import, once, before anything is forked. Starts no thread and computes nothing."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    for name in _PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)  # threads do not survive a fork


def watch_files(root: str, changes: frozenset[str], note: Callable[[str], None]) -> None:
    """Tells every operation on files of this process and its forks before it happens; it cannot be taken back.

    Args:
        root: paths that begin so count, and every fsync.
        changes: audited events that count, beside opens for writing.
        note: hears the path, or that it is an fsync; what it raises, the operation raises.
    """
    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
                return
        elif event in changes:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root):
            note(os.fspath(path))

    fsync = os.fsync

    def noted(handle: Any) -> None:
        note("an fsync")
        fsync(handle)

    os.fsync = noted
    sys.addaudithook(audit)


class FileOperations:
    """Counts what a process and its forks do to files below a folder, and may end the group before one of them.

    Args:
        root: operations on paths below it count, and every fsync.
        fatal: number of the operation before which the process group is killed; None only counts.
        count_file: takes the number of operations at the end.
    """

    def __init__(self, root: Path, fatal: int | None, count_file: Path | None) -> None:
        self._root, self._fatal, self._count_file = str(root), fatal, count_file
        self._seen = 0

    def install(self) -> None:
        """Watches this process from now on; it cannot be taken back."""
        watch_files(self._root, _CHANGES, self._count)

    def _count(self, what: str) -> None:
        self._seen += 1
        if self._seen == self._fatal:
            os.killpg(os.getpgrp(), signal.SIGKILL)
            time.sleep(60)

    def report(self) -> None:
        """Writes how many operations there were."""
        if self._count_file is not None:
            with open(self._count_file, "w", encoding="ascii") as file:
                file.write(str(self._seen))


def fork_call(call: Callable[[], int], *, new_session: bool = True) -> int:
    """Runs `call` in a fork and returns its process id; the fork exits with what `call` returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if new_session:
            os.setsid()
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(code)


def be_new_process(out: int, keep: Sequence[int] = (), stdin: int | None = None) -> None:
    """Gives this fork what exec would have given it: standard streams, default signals, no inherited descriptors.

    Args:
        out: descriptor that takes standard output and error.
        keep: descriptors that stay open.
        stdin: descriptor of standard input; nothing to read when left out.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGPIPE else signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source_of_input = os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin
    for source, target in ((source_of_input, 0), (out, 1), (1, 2)):
        os.dup2(source, target)
    kept = sorted({0, 1, 2, *keep})
    for low, high in zip(kept, [*kept[1:], 65536], strict=True):
        os.closerange(low + 1, high)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8", line_buffering=True)
        for number in (1, 2)
    )
    tempfile.tempdir = None  # read again from the new environment


def run_python(arguments: Sequence[str]) -> int:
    """Runs what follows `python` on a command line (-P, -m MODULE, SCRIPT) in this process. Returns its exit code."""
    words = [word for word in arguments if word != "-P"]
    try:
        if words[0] == "-m":
            sys.argv = [words[1], *words[2:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 0


class ForkedProcess:
    """The part of subprocess.Popen that stages are started with, for a command line that begins with this Python.

    `started` is told every process: its command line, and its id, which is its group's where it has a session of its
    own. `watch` may give what counts the file operations of a command line.
    """

    started: Callable[[list[str], int], None] | None = None
    watch: Callable[[list[str]], FileOperations | None] | None = None

    def __init__(
        self, args: Sequence[str], *, stdin: int | None = None, stdout: IO[bytes] | None = None,
        stderr: int | None = None, cwd: Path | None = None, env: Mapping[str, str] | None = None,
        start_new_session: bool = False, pass_fds: Sequence[int] = (),
    ) -> None:
        if args[0] != sys.executable or stdout is None or stdin != subprocess.DEVNULL or stderr != subprocess.STDOUT:
            raise ValueError(f"not a process that is forked: {args}")
        self.args, self.returncode = list(args), None
        environment = dict(os.environ if env is None else env)

        def work() -> int:
            be_new_process(stdout.fileno(), pass_fds)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            if cwd is not None:
                os.chdir(cwd)
            sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
            operations = type(self).watch(self.args) if type(self).watch else None
            if operations:
                operations.install()
            code = run_python(self.args[1:])
            if operations:
                operations.report()
            return code

        self.pid = fork_call(work, new_session=start_new_session)
        if type(self).started:
            type(self).started(self.args, self.pid)

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """Sends SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


class ForkingSubprocess:
    """Stands for the module `subprocess` in one module of ours: Popen forks, everything else is the real one's."""

    Popen = ForkedProcess

    def __getattr__(self, name: str) -> Any:
        """Returns what the real module has under this name."""
        return getattr(subprocess, name)
