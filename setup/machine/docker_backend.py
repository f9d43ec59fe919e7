"""Runs each stage as a container of the project's image: as the calling user, on the same absolute paths."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparktune.setup.machine.backends import MODULES, TRAINING, StopSignals, program_root
from sparktune.setup.machine.detect import nvidia_gpus
from sparktune.setup.machine.engine import (
    ENGINE_GONE,
    INFINIBAND,
    connect,
    create_container,
    network_for_downloads,
    start_container,
)
from sparktune.setup.machine.image import PACKAGE, ensure_image, load_stack
from sparktune.setup.machine.image_build import Cancelled
from sparktune.setup.plan.errors import ExitCode, PreflightError
from sparktune.setup.plan.models import adapter_base, is_adapter_folder
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import Plan

__all__ = [
    "HUB_FILE", "ROLE_LABEL", "RUN_LABEL", "DockerBackend", "ImageOptions", "container_base", "container_options",
    "environment_of", "exit_code_of", "hub_folder", "hub_token", "mounts_of", "needs_network", "rdma_devices",
    "reads_hub",
    "source_of",
]

RUN_LABEL = "org.sparktune.run"
STAGE_LABEL = "org.sparktune.stage"
ROLE_LABEL = "org.sparktune.role"
HUB_FILE = "/run/secrets/hub"
"""Where a container finds the user's hub token, a read-only file."""
CHECKOUT = "/opt/sparktune"
_SCRATCH = "/scratch"
"""In memory, in containers that leave nothing."""
_POLL_S = 0.1
_STATUS_S = 0.5
_STOP_S = 60
_STACK = 64 * 2**20
_CODE_SIGKILLED = 137
_UNASKED_ENDS = {
    _CODE_SIGKILLED: "was ended by SIGKILL. If nobody did that, the machine ran out of memory: see journalctl -k.",
    int(ExitCode.MEMORY): "ended because memory ran out.",
}


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What one start wants of the image. Nothing of it belongs to the run, so no plan keeps it."""

    rebuild: Literal["no", "yes", "clean"] = "no"
    """Build although nothing changed; clean removes the image first and reuses no layer."""
    dev_mount: bool = False
    """Mount this checkout's package, read-only, over the one in the image: for development."""

    def flags(self) -> str:
        """Returns the flags that were given, as messages spell them."""
        given = {"--rebuild": self.rebuild != "no", "--dev-mount": self.dev_mount}
        return ", ".join(flag for flag, is_given in given.items() if is_given)

    def for_later(self) -> ImageOptions:
        """Returns what is left to ask for when the image has been made."""
        return ImageOptions(dev_mount=self.dev_mount)


def hub_folder() -> Path:
    """Returns the folder of what was downloaded from the hub."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").absolute()


@contextmanager
def hub_token() -> Iterator[Path | None]:
    """Gives the user's hub token as a file, or None where there is none.

    A token in HF_TOKEN goes into a file that only this user can read and that is removed at the end: as a container's
    variable or argument it would show in `docker inspect` and `ps`. A token that is a file already is never read.
    """
    named = os.environ.get("HF_TOKEN_PATH")
    path = Path(named) if named else hub_folder() / "token"
    text = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not text:
        yield path.absolute() if path.is_file() else None
        return
    place = os.environ.get("XDG_RUNTIME_DIR", "")  # in memory; after `su` it is another user's
    with tempfile.TemporaryDirectory(prefix="sparktune-", dir=place if os.access(place, os.W_OK) else None) as folder:
        file = Path(folder) / "hub"  # both made with no rights for others
        file.touch(mode=0o600)
        file.write_text(text, encoding="utf-8")
        yield file


def source_of(plan: Plan) -> str:
    """Returns the model that a run reads weights from: a folder, or a hub id; an adapter's base."""
    folder = Path(os.path.expanduser(plan.model))
    return adapter_base(folder) if is_adapter_folder(folder) else str(folder) if folder.exists() else plan.model


def reads_hub(stage: str, plan: Plan) -> bool:
    """Returns whether a stage may ask the model hub."""
    return stage in ("prepare", "train", "merge", "mtp") and not Path(source_of(plan)).exists()


def needs_network(stage: str, plan: Plan) -> bool:
    """Returns whether a stage may download: a model or MTP head that is a hub id, or the GGUF converter's first use."""
    if stage == "mtp" and plan.mtp_head and not Path(os.path.expanduser(plan.mtp_head)).exists():
        return True
    if stage == "gguf":
        folder = cache_dir("llama.cpp")
        return not (folder.is_dir() and any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir()))
    return reads_hub(stage, plan)


_SYSTEM = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/", "/etc/", "/proc/", "/sys/", "/dev/")


def mounts_of(run: RunDir, plan: Plan) -> dict[str, str]:
    """Returns host folder -> mode ("rw" or "ro"); each is mounted where it is, so that a plan's paths stay valid."""
    written = (run.root, Path(plan.output).absolute(), hub_folder(), _state_folder(), cache_dir("tokens"),
               cache_dir("cleaned"), cache_dir("llama.cpp"), cache_dir("locks"))
    found = {str(path): "rw" for path in written}
    head = Path(os.path.expanduser(plan.mtp_head)) if plan.mtp_head else None
    # the user's own script; a program of the system is the image's
    scripts = [Path(word) for word in plan.validator or () if os.path.isabs(word) and not word.startswith(_SYSTEM)]
    read = (plan.data, plan.eval_data, head, Path(os.path.expanduser(plan.model)), Path(source_of(plan)), *scripts)
    for path in read:
        if path is not None and path.exists():
            real = path.absolute()
            folder = real if real.is_dir() else real.parent
            found.setdefault(str(folder), "ro")
            if real.is_symlink():
                found.setdefault(str(real.resolve().parent), "ro")
    return found


def _make(folder: Path) -> None:
    """Makes a folder that a container writes to: the engine would make it too, and root would own it.

    Raises:
        PreflightError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(f"A container should write to {folder}, which cannot be made ({error.strerror}). "
                             "XDG_CACHE_HOME and HF_HOME say where caches are, --results and --output where runs go."
                             ) from error


def _state_folder() -> Path:
    """Returns the folder that a container has as home: compiled kernels stay there from run to run."""
    return cache_dir("home")


def environment_of(network: bool) -> dict[str, str]:
    """Returns a container's variables: where its caches are, and nothing of ours that is secret."""
    home = _state_folder()
    found = {
        "HOME": str(home), "USER": "sparktune",  # an unknown uid has no name, which breaks getpass
        "XDG_CACHE_HOME": str(cache_dir("tokens").parent.parent), "HF_HOME": str(hub_folder()),
        "TRITON_CACHE_DIR": str(home / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
        "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    }
    # how much of a shared machine the user gave us; what NCCL tells of its way; which hub, and whether to ask it
    for name in ("OMP_NUM_THREADS", "NCCL_DEBUG", *(("HF_ENDPOINT", "HF_HUB_OFFLINE") if network else ())):
        if value := os.environ.get(name):
            found[name] = value
    return found if network else {**found, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _over_the_images(package: Path) -> dict[str, dict[str, str]]:
    """Returns the mounts that put a checkout's package over the one in the image."""
    return {str(package / name): {"bind": f"{CHECKOUT}/{name}", "mode": "ro"} for name in PACKAGE}


def _as_the_caller() -> dict[str, Any]:
    """Returns what every container of ours has: the calling user's ids, no capability, no terminal."""
    return {
        "user": f"{os.getuid()}:{os.getgid()}", "ipc_mode": "host", "stdin_open": False, "tty": False,
        "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"],
    }


def container_base(role: str, user: str, *, gpus: bool = False) -> dict[str, Any]:
    """Returns the options of a container that looks or measures and writes nothing that stays.

    Args:
        role: what it is for, a word.
        user: "uid:gid" of the machine that it runs on.
        gpus: give it every GPU.
    """
    options = {
        **_as_the_caller(), "user": user, "working_dir": _SCRATCH, "tmpfs": {_SCRATCH: ""},
        "environment": {"HOME": _SCRATCH, "USER": "sparktune", "PYTHONUNBUFFERED": "1"},
        "name": f"sparktune-{role}-{os.getpid()}-{time.monotonic_ns()}", "labels": {ROLE_LABEL: role},
    }
    return options | (_with_gpus() if gpus else {})


def _with_gpus() -> dict[str, Any]:
    from docker.types import DeviceRequest, Ulimit

    return {
        "device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])],
        # pinned memory counts as locked memory, of which the default allows 64 KiB
        "ulimits": [Ulimit(name="memlock", soft=-1, hard=-1), Ulimit(name="stack", soft=_STACK, hard=_STACK)],
    }


def container_options(
    client: Any, stage: str, run: RunDir, plan: Plan, *, gpus: bool, image: str, token: Path | None = None,
    package: Path | None = None, interface: str | None = None,
) -> dict[str, Any]:
    """Returns the arguments of `containers.create` for one stage.

    Args:
        client: the engine.
        stage: a stage's name.
        run: its folders.
        plan: its plan.
        gpus: give the container every GPU.
        image: tag of the image.
        token: file of the user's hub token; only a stage that may ask the hub gets it.
        package: a checkout whose package is mounted over the image's own.
        interface: network interface to a second machine; training then has the host's network and InfiniBand.
    """
    mounts = mounts_of(run, plan)
    for folder in mounts:
        if ":" in folder:  # it parts host from container in the engine's own notation
            raise PreflightError(f"Docker cannot mount a folder whose path holds a colon, as {folder} does. Rename it, "
                                 "or run without an image: --backend local.")
    for folder, mode in mounts.items():
        if mode == "rw":
            _make(Path(folder))
    volumes = {folder: {"bind": folder, "mode": mode} for folder, mode in mounts.items()}
    network = needs_network(stage, plan)
    environment = environment_of(network)
    if token is not None and reads_hub(stage, plan):
        volumes[str(token)] = {"bind": HUB_FILE, "mode": "ro"}
        environment["HF_TOKEN_PATH"] = HUB_FILE
    if package is not None:
        volumes |= _over_the_images(package)
    if stage in TRAINING:
        command = ["python", "-P", f"{CHECKOUT}/train.py", "--config", str(run.plan), *TRAINING[stage]]
    else:
        command = ["python", "-P", "-m", MODULES[stage], "--run", str(run.root)]
    options: dict[str, Any] = {
        "image": image, "command": command, "environment": environment, "volumes": volumes,
        "name": f"sparktune-{re.sub(r'[^a-zA-Z0-9_.-]', '-', run.name).strip('.-')}-{stage}-{os.getpid()}",
        "labels": {RUN_LABEL: str(run.root), STAGE_LABEL: stage},
        # the run folder holds no `specs`, which gcc would read while Triton compiles
        "working_dir": str(run.root),
        "network_mode": network_for_downloads(client) if network else "none",
        **_as_the_caller(),
    }
    if gpus:
        options |= _with_gpus()
    if interface is not None and stage == "train":
        options["network_mode"] = "host"
        environment |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
        options |= rdma_devices(Path(INFINIBAND).exists())
    return options


def rdma_devices(there: bool) -> dict[str, Any]:
    """Returns the option that gives a container InfiniBand's devices, where its machine has them."""
    return {"devices": [f"{INFINIBAND}:{INFINIBAND}:rwm"]} if there else {}


class DockerBackend:
    """Runs each stage as one container. Its output goes to RUN/log.txt, its events through the mounted run folder."""

    name = "docker"

    def __init__(self, plan: Plan, options: ImageOptions | None = None) -> None:
        """Reaches the engine.

        Args:
            plan: the run's plan.
            options: what this start wants of the image.

        Raises:
            UsageError: the plan's stack is none of ours.
            PreflightError: no engine answers.
        """
        self._options = options or ImageOptions()
        self._root = program_root()
        load_stack(self._root, plan.stack)
        self._client = connect()
        self._plan = plan
        self._image: str | None = None
        self._gpus = plan.device != "cpu" and bool(nvidia_gpus())

    def prepare(self, on_event: Callable[[dict[str, Any]], None], stop: StopSignals) -> None:
        """Makes sure of the image, building it where an input changed.

        Args:
            on_event: takes the build's progress events.
            stop: the first signal cancels the build.

        Raises:
            PreflightError, BuildFailed, Cancelled: see `ensure_image`.
        """
        if self._image is None:
            image = ensure_image(
                self._client, self._root, self._plan.stack, on_event=on_event, should_stop=lambda: stop.count > 0,
                rebuild=self._options.rebuild, any_package=self._options.dev_mount,
            )
            self._image = image.tag
            on_event({"kind": "choice", "what": "image", "chosen": image.tag,
                      "reason": "built just now" if image.built else "there already, no input changed"})
            if self._options.dev_mount:
                on_event({"kind": "choice", "what": "package", "chosen": str(self._root),
                          "reason": "--dev-mount: read-only over the one in the image"})

    def run_stage(
        self, stage: str, run: RunDir, plan: Plan, *, on_poll: Callable[[], None], stop: StopSignals,
        lock_fd: int | None,
    ) -> int:
        """Runs `stage`; see `Backend.run_stage`.

        A container cannot hold the run's lock. A container that an earlier, killed start left behind is told by its
        label and ended first: whoever holds the lock now owns the run.
        """
        if self._image is None:
            self.prepare(lambda event: None, stop)
        image = str(self._image)
        self._end_leftovers(run)
        with hub_token() as token, run.log.open("ab") as log:
            options = container_options(
                self._client, stage, run, plan, gpus=self._gpus, image=image, token=token,
                package=self._root if self._options.dev_mount else None,
            )
            log.write(f"\n==> {stage}: {time.strftime('%Y-%m-%d %H:%M:%S')}, container {options['name']}, "
                      f"image {image}\n".encode())
            log.flush()
            container = create_container(self._client, **options)
            try:
                start_container(container)
                writer = threading.Thread(target=_copy_log, args=(container, log), daemon=True)
                writer.start()
                code = self._wait(container, on_poll, stop)
                writer.join(timeout=10)
                if text := _UNASKED_ENDS.get(code) if not stop.count else None:
                    log.write(f"\nThe container {options['name']} {text}\n".encode())
                return code
            finally:
                with suppress(Exception):  # already gone, or the engine is: nothing is left to remove
                    container.remove(force=True)

    def run_module(self, module: str, argument: str, folder: Path) -> tuple[int, str]:
        """Runs a module of ours that writes into one folder and needs no network.

        Args:
            module: its full name.
            argument: its one argument.
            folder: the only one that it may write to.

        Returns:
            Exit code and output.

        Raises:
            PreflightError: the engine would not start it, or went away.
            Cancelled: a signal ended it.
        """
        with StopSignals() as stop:
            self.prepare(lambda event: None, stop)
            written = (folder, _state_folder())
            for path in written:
                _make(path)
            volumes = {str(path): {"bind": str(path), "mode": "rw"} for path in written}
            if self._options.dev_mount:
                volumes |= _over_the_images(self._root)
            container = create_container(
                self._client, image=self._image, command=["python", "-P", "-m", module, argument], volumes=volumes,
                environment=environment_of(False), name=f"sparktune-{module.rpartition('.')[2]}-{os.getpid()}",
                labels={ROLE_LABEL: module}, working_dir=str(folder), network_mode="none", **_as_the_caller(),
            )
            try:
                start_container(container)
                code = self._wait(container, lambda: None, stop)
                if stop.count:
                    raise Cancelled(f"{module} was stopped.")
                return code, container.logs().decode("utf-8", "replace")
            finally:
                with suppress(Exception):  # already gone, or the engine is: nothing is left to remove
                    container.remove(force=True)

    def _end_leftovers(self, run: RunDir) -> None:
        for container in self._client.containers.list(all=True, filters={"label": f"{RUN_LABEL}={run.root}"}):
            with run.log.open("a", encoding="utf-8") as log:
                log.write(f"\nA container of an earlier start was still there ({container.name}); it was ended.\n")
            if container.status == "running":
                container.stop(timeout=_STOP_S)
            container.remove(force=True)

    def _wait(self, container: Any, on_poll: Callable[[], None], stop: StopSignals) -> int:
        from docker.errors import APIError, NotFound

        passed_on, looked = False, 0.0
        while True:
            try:
                if stop.count and not passed_on:
                    passed_on = True
                    container.kill(signal="SIGINT")
                if stop.count > 1:
                    container.kill(signal="SIGKILL")
                    return int(ExitCode.INTERRUPTED)
                if time.monotonic() - looked > _STATUS_S:
                    looked = time.monotonic()
                    container.reload()
                    if container.status in ("exited", "dead"):
                        return exit_code_of(container)
            except NotFound:
                return _CODE_SIGKILLED
            except APIError as error:
                if error.status_code != 409:  # it ended between the look and the signal
                    raise
            except OSError as error:
                raise PreflightError(ENGINE_GONE) from error
            on_poll()
            time.sleep(_POLL_S)


def exit_code_of(container: Any) -> int:
    """Returns what an ended container's process ended with; the code of memory where the kernel ended it for that."""
    state = container.attrs["State"]
    return int(state.get("ExitCode", 1)) if not state.get("OOMKilled") else int(ExitCode.MEMORY)


def _copy_log(container: Any, log: Any) -> None:
    """Copies a container's output until it ends. What the engine's death cuts off is lost with the container."""
    with suppress(Exception):
        for chunk in container.logs(stream=True, follow=True, stdout=True, stderr=True):
            log.write(chunk)
            log.flush()
