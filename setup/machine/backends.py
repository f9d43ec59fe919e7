"""Where a stage runs. A backend runs one stage as one process and returns its exit code."""

from __future__ import annotations

import importlib.util
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import sparktune
from sparktune.setup.machine.detect import nvidia_gpus
from sparktune.setup.plan.config import ENV_PREFIX
from sparktune.setup.plan.errors import ExitCode, PreflightError, UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan

if TYPE_CHECKING:
    from sparktune.setup.machine.docker_backend import ImageOptions

__all__ = [
    "MODULES", "TRAINING", "Backend", "LocalBackend", "StopSignals", "chat_process", "choose_backend", "program_root",
]

_POLL_S = 0.1
MODULES = {
    "prepare": "sparktune.setup.data.tokenise",
    "merge": "sparktune.setup.export.merge",
    "mtp": "sparktune.setup.export.train_mtp_step",
    "gguf": "sparktune.setup.export.gguf",
    "evaluate": "sparktune.setup.export.evaluate",
    "report": "sparktune.setup.report",
}
"""Stage -> module that is started with `--run RUN`."""

TRAINING = {"train": (), "calibrate": ("--rehearse", "15")}
"""Stages that `train.py --config RUN/plan.yaml` runs -> what else it is told."""


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into requests that the running stage gets: the first to stop, the second to end.

    A context manager; main thread only. `on_first` is called once, from the signal handler.
    """

    def __init__(self, on_first: Callable[[], None] | None = None) -> None:
        self.count = 0
        """Signals received."""
        self._on_first = on_first
        self._before: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.count == 1 and self._on_first:
            self._on_first()

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Lets standard streams end in nothing where they led to a terminal, which is gone: writing to it would fail."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        # a terminal that was closed is still a device, and no terminal any more
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            os.dup2(nothing, stream)
    os.close(nothing)


class Backend(Protocol):
    """Runs stages."""

    name: str

    def run_stage(
        self, stage: str, run: RunDir, plan: Plan, *, on_poll: Callable[[], None], stop: StopSignals,
        lock_fd: int | None,
    ) -> int:
        """Runs `stage` to its end.

        Args:
            stage: a name of docs/architecture.md.
            run: its folders.
            plan: the plan that RUN/plan.yaml holds.
            on_poll: called several times a second while the stage runs.
            stop: signals so far; the first is passed on as SIGINT, the second kills.
            lock_fd: file descriptor of the run's lock, which the stage must hold as long as it lives.

        Returns:
            The exit code; 128 + number when a signal ended the stage, 130 when it was killed on request.
        """


def program_root() -> Path:
    """Returns the folder that holds train.py and scripts/.

    Raises:
        PreflightError: the package was installed without them.
    """
    root = Path(sparktune.__file__).resolve().parents[2]
    if not (root / "train.py").is_file():
        raise PreflightError(
            f"train.py should lie beside the package, in {root}; it does not. "
            "Start sparktune from its source checkout, with ./run.sh."
        )
    return root


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def local_python(root: Path) -> str:
    """Returns an interpreter that has torch: this one, or the `local` environment's (made when it is not there).

    Raises:
        PreflightError: it could not be made; scripts/venv.sh has said why.
    """
    if _has_torch():
        return sys.executable
    made = subprocess.run([str(root / "scripts" / "venv.sh"), "local"], stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode == ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if made.returncode != 0:
        raise PreflightError(
            "Training on this machine needs the local environment (with torch), which could not be made; "
            "the lines above say why."
        )
    return made.stdout.strip()


def chat_process(model: Path) -> int:
    """Talks to the model in `model` on this terminal, in a process that has torch. Returns its exit code."""
    argv = [local_python(program_root()), "-P", "-m", "sparktune.setup.chat", "--model", str(model)]
    code = subprocess.run(argv, env=LocalBackend.environment(), check=False).returncode
    return 128 - code if code < 0 else code


def push_process(root: Path, words: Sequence[str]) -> int:
    """Shows and sends the run in `root`, in a process that has the hub's client. Returns its exit code."""
    argv = [local_python(program_root()), "-P", "-m", "sparktune.setup.export.push", "--run", str(root), *words]
    code = subprocess.run(argv, env=LocalBackend.environment(), check=False).returncode
    return 128 - code if code < 0 else code


class LocalBackend:
    """Runs each stage as a process on this machine, in its own process group, its output in RUN/log.txt."""

    name = "local"

    def __init__(self) -> None:
        self._root = program_root()
        self._python: str | None = None

    def command(self, stage: str, run: RunDir) -> list[str]:
        """Returns the argument list of `stage`."""
        # -P: neither the current folder nor the script's own may shadow packages (a folder `kernels` would)
        if stage == "prepare":  # needs no torch, so the data can be looked at before gigabytes are installed
            return [sys.executable, "-P", "-m", MODULES[stage], "--run", str(run.root)]
        if self._python is None:
            self._python = local_python(self._root)
        if stage in TRAINING:
            return [self._python, "-P", str(self._root / "train.py"), "--config", str(run.plan), *TRAINING[stage]]
        return [self._python, "-P", "-m", MODULES[stage], "--run", str(run.root)]

    @staticmethod
    def environment() -> dict[str, str]:
        """Returns the stage's environment: ours, without what would change its imports or override its plan."""
        env = {
            k: v for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH") and not k.startswith(ENV_PREFIX)
        }
        return {**env, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}

    def run_stage(
        self, stage: str, run: RunDir, plan: Plan, *, on_poll: Callable[[], None], stop: StopSignals,
        lock_fd: int | None,
    ) -> int:
        """Runs `stage`; see `Backend.run_stage`."""
        argv = self.command(stage, run)
        with run.log.open("ab") as log:
            log.write(f"\n==> {stage}: {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            # the run folder as working directory: it holds no `specs`, which gcc would read while Triton compiles
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=run.root,
                env=self.environment(), start_new_session=True, pass_fds=() if lock_fd is None else (lock_fd,),
            )
        return _wait(process, on_poll, stop)


def _wait(process: subprocess.Popen[bytes], on_poll: Callable[[], None], stop: StopSignals) -> int:
    passed_on = False
    try:
        while process.poll() is None:
            if stop.count and not passed_on:
                passed_on = True
                _signal_group(process, signal.SIGINT)
            if stop.count > 1:
                _signal_group(process, signal.SIGKILL)
                process.wait()
                return ExitCode.INTERRUPTED
            on_poll()
            time.sleep(_POLL_S)
    except BaseException:
        _signal_group(process, signal.SIGKILL)
        process.wait()
        raise
    code = process.returncode
    return 128 - code if code < 0 else code


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # it ended between the look and the signal


def choose_backend(plan: Plan, image: ImageOptions | None = None) -> tuple[Backend, str]:
    """Returns the backend of `plan` and why it was chosen.

    Args:
        plan: the plan.
        image: what this start wants of the image.

    Raises:
        PreflightError: it cannot be used here; the sentence says what is missing and what to do.
        UsageError: something is wanted of the image, and the backend has none.
    """
    # it stands on this module, and imports the SDK's room only when an engine is wanted
    from sparktune.setup.machine.docker_backend import DockerBackend

    if plan.peers and plan.backend != "local":  # resume RUN --backend local goes on with this machine alone
        from sparktune.setup.machine.boxes import BoxesBackend

        return BoxesBackend(plan, image), f"--peers {','.join(plan.peers)}"
    if plan.backend == "docker":
        return DockerBackend(plan, image), "asked for"
    if plan.backend == "local":
        reason = "asked for"
    elif not nvidia_gpus():
        reason = "auto: no NVIDIA GPU here, so the image would bring nothing"
    else:
        try:
            return DockerBackend(plan, image), "auto: an NVIDIA GPU and a Docker engine are here"
        except PreflightError as error:
            reason = f"auto: {error}"
    if wanted := image.flags() if image else "":
        raise UsageError(f"{wanted} is about the Docker image, but this run's backend is local ({reason}). "
                         "Add --backend docker, or leave it out.")
    return LocalBackend(), reason
