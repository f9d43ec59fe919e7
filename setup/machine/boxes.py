"""Training on several machines: one container on each, the same image, one log, one Ctrl-C.

Only the stage `train` runs on all of them; the others run here, where the run's folder is. What the others need (plan,
data, base model) is sent to the same paths there, if it is not there already.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.setup.machine.backends import StopSignals
from sparktune.setup.machine.docker_backend import (
    RUN_LABEL,
    DockerBackend,
    ImageOptions,
    container_options,
    environment_of,
    exit_code_of,
    hub_folder,
    hub_token,
    mounts_of,
    rdma_devices,
    source_of,
)
from sparktune.setup.machine.engine import ENGINE_GONE, create_container, start_container
from sparktune.setup.machine.inventory import known_files
from sparktune.setup.machine.peers import Peer, answering, at_home, look, make_folders, reach, send_files, send_image
from sparktune.setup.plan.errors import ExitCode, PreflightError, UsageError
from sparktune.setup.plan.links import interface_to
from sparktune.setup.plan.models import resolve_model_dir
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan

__all__ = ["BoxesBackend", "free_port", "inputs_of", "link_of", "own_address"]

_POLL_S = 0.1
_STATUS_S = 0.5
_FAR_STATUS_S = 2.0
_LEFT_ALONE_S = 60.0
"""For the other ranks to end by themselves once one machine's have: they notice within 20 s and say why."""
_HERE = "this machine"


def own_address(other: str) -> str:
    """Returns this machine's own IPv4 address on the network that leads to another.

    Raises:
        PreflightError: none does.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        try:
            probe.connect((other, 9))
            return str(probe.getsockname()[0])
        except OSError as error:
            text = f"No network leads from here to {other} ({error.strerror}). See `ip route`."
            raise PreflightError(text) from error


def link_of(peers: list[Peer]) -> tuple[str, str]:
    """Returns (own address, own interface) on the network that all the other machines are on.

    Raises:
        PreflightError: there is no such network.
    """
    ways = {(own_address(peer.address), interface_to(peer.address)) for peer in peers}
    if len(ways) != 1 or None in next(iter(ways)):
        shown = ", ".join(f"{name or 'no interface'} ({address})" for address, name in sorted(ways, key=str))
        raise PreflightError(
            f"The machines of --peers should all be reached through one interface; they are through {shown}. Give "
            "their addresses on the network that joins them."
        )
    address, name = ways.pop()
    return address, str(name)


def inputs_of(run: RunDir, plan: Plan) -> list[str]:
    """Returns the files and folders that every machine reads: the plan, the data, the base (and the adapter on it)."""
    found = [run.plan, *(p.absolute() for p in (plan.data, plan.eval_data) if p is not None)]
    for text in dict.fromkeys((os.path.expanduser(plan.model), source_of(plan))):
        folder = Path(text)
        if folder.exists():
            found.append(folder.absolute())
        else:
            found.append(hub_folder() / "hub" / f"models--{text.replace('/', '--')}")
    return [str(path) for path in dict.fromkeys(found)]


def mounted_above(root: str, mounts: Iterable[str]) -> Path:
    """Returns the folder that files of an input are sent to: the innermost mount that holds it.

    Only a mount is sure to be there in a container: below a cache of the hub a model's folder may still be missing.
    """
    holding = [mount for mount in mounts if root == mount or root.startswith(mount.rstrip("/") + "/")]
    folder = max(holding, key=len)
    return Path(folder)


def is_own(address: str) -> bool:
    """Says whether an IPv4 address is this machine's."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def free_port(address: str) -> int:
    """Returns a port that nothing listens on at an own address."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


@dataclass(kw_only=True)
class _Part:
    """One machine's container."""

    name: str
    container: Any
    far: bool
    code: int | None = None
    looked: float = 0.0

    def start(self) -> None:
        """Starts it.

        Raises:
            PreflightError: its engine would not, or went away.
        """
        if not self.far:
            start_container(self.container)
            return
        with answering(self.name):
            start_container(self.container, where=self.name)

    def look(self) -> None:
        """Notes whether it has ended. A machine that does not answer has not: its ranks' silence ends the others."""
        from docker.errors import NotFound

        now = time.monotonic()
        if self.code is not None or now - self.looked < (_FAR_STATUS_S if self.far else _STATUS_S):
            return
        self.looked = now
        try:
            self.container.reload()
            if self.container.status in ("exited", "dead"):
                self.code = exit_code_of(self.container)
        except NotFound:
            self.code = 137
        except Exception as error:
            if not self.far:
                raise PreflightError(ENGINE_GONE) from error

    def signal(self, name: str) -> None:
        """Sends a signal; one that has ended needs none."""
        with suppress(Exception):  # it ended meanwhile, or its machine is gone
            self.container.kill(signal=name)


class _SharedLog:
    """One file that several machines' output goes to, whole lines at a time."""

    def __init__(self, file: Any) -> None:
        self._file, self._lock = file, threading.Lock()

    def line(self, text: bytes) -> None:
        """Writes one line.

        Raises:
            PreflightError: the disk is full, say.
        """
        with self._lock, at_home("write the run's log"):
            self._file.write(text.rstrip(b"\n") + b"\n")
            self._file.flush()

    def copy(self, container: Any, name: str, far: bool) -> None:
        """Copies a container's output until it ends; that of another machine says where it is from."""
        mark, rest = f"[{name}] ".encode() if far else b"", b""
        with suppress(Exception):  # the engine or the way to it is gone, and what it had to say with it
            for chunk in container.logs(stream=True, follow=True, stdout=True, stderr=True):
                *lines, rest = (rest + chunk).split(b"\n")
                for text in lines:
                    self.line(mark + text)
        if rest:
            self.line(mark + rest)


def _weights_are_here(plan: Plan, log: _SharedLog, on_poll: Callable[[], None], stop: StopSignals) -> bool:
    """Fetches a base that is a hub id: the other machines get it from here, and ask no hub. False: a signal came.

    Raises:
        SparktuneError: see `resolve_model_dir`.
    """
    if Path(source_of(plan)).exists():
        return True
    log.line(f"Fetching {plan.model} from the hub, for all machines.".encode())
    failed: list[BaseException] = []

    def fetch() -> None:
        try:
            resolve_model_dir(plan.model)
        except BaseException as error:  # told by the thread that waits
            failed.append(error)

    worker = threading.Thread(target=fetch, daemon=True)
    worker.start()
    while worker.is_alive():
        if stop.count:
            return False
        on_poll()
        worker.join(_POLL_S)
    if failed:
        raise failed[0]
    return True


def _unwritable(peer: Peer, path: str) -> PreflightError:
    return PreflightError(
        f"On {peer.host} user {peer.uid} should be able to write {path}, which a run reads and which differs from this "
        f"machine's; it may not. Give that folder to the user over there: sudo chown {peer.uid}:{peer.gid} "
        f"{os.path.dirname(path)}"
    )


def _interface(found: Mapping[str, Any], peer: Peer, address: str) -> str:
    if found["interface"] is None or not found["interface"]["up"]:
        raise PreflightError(f"On {peer.host} no interface that is up leads to {address}. See `ip route` there.")
    return str(found["interface"]["name"])


class BoxesBackend(DockerBackend):
    """Runs the stage `train` on this machine and on the plan's peers, and every other stage here."""

    name = "docker on several machines"

    def __init__(self, plan: Plan, options: ImageOptions | None = None) -> None:
        """Reaches the engines.

        Raises:
            UsageError, PreflightError: see DockerBackend; a peer cannot be reached or is another kind of machine.
        """
        if options is not None and options.dev_mount:
            raise UsageError("--dev-mount mounts this checkout, which the machines of --peers do not have. Leave it "
                             "out.")
        super().__init__(plan, options)
        self._peers = [reach(host) for host in plan.peers]
        here = os.uname().machine
        for peer in self._peers:
            if peer.arch != here:
                raise PreflightError(f"{peer.host} should be a machine like this one, {here}; it is {peer.arch}. An "
                                     "image fits one architecture.")
        addresses = [peer.address for peer in self._peers]
        for peer in self._peers:
            if addresses.count(peer.address) > 1 or is_own(peer.address):
                raise PreflightError(f"--peers should name every other machine once; {peer.host} ({peer.address}) is "
                                     f"{'this one' if is_own(peer.address) else 'named twice'}.")
        self._clients = {peer.host: peer.client() for peer in self._peers}
        self._sent = False

    def prepare(self, on_event: Callable[[dict[str, Any]], None], stop: StopSignals) -> None:
        """Makes sure of the image here, and of the same one on every peer; see `DockerBackend.prepare`."""
        super().prepare(on_event, stop)
        if self._sent:
            return
        for peer in self._peers:
            sent = send_image(self._client, self._clients[peer.host], str(self._image), peer.host, on_event,
                              lambda: stop.count > 0)
            on_event({"kind": "choice", "what": f"image on {peer.host}", "chosen": str(self._image),
                      "reason": "sent from here" if sent else "there already, the same image id"})
        self._sent = True

    def run_stage(
        self, stage: str, run: RunDir, plan: Plan, *, on_poll: Callable[[], None], stop: StopSignals,
        lock_fd: int | None,
    ) -> int:
        """Runs `stage`; see `Backend.run_stage`."""
        if stage != "train":
            return super().run_stage(stage, run, plan, on_poll=on_poll, stop=stop, lock_fd=lock_fd)
        if self._image is None:
            self.prepare(lambda event: None, stop)
        self._end_leftovers(run)
        with hub_token() as token, run.log.open("ab") as file:
            log = _SharedLog(file)
            if not _weights_are_here(plan, log, on_poll, stop):
                return int(ExitCode.INTERRUPTED)
            log.line(f"\n==> {stage}: {time.strftime('%Y-%m-%d %H:%M:%S')} on {1 + len(self._peers)} machines, "
                     f"image {self._image}".encode())
            address, interface = link_of(self._peers)
            options = container_options(
                self._client, stage, run, plan, gpus=self._gpus, image=str(self._image), token=token,
                interface=interface,
            )
            meeting = f"{1 + len(self._peers)}@{address}:{free_port(address)}"
            with self._containers(options, meeting, run, plan, address, log, on_poll, stop) as parts:
                if stop.count:
                    return int(ExitCode.INTERRUPTED)
                for part in reversed(parts):  # here last: its ranks wait for the others
                    part.start()
                writers = [threading.Thread(target=log.copy, args=(p.container, p.name, p.far), daemon=True)
                           for p in parts]
                for writer in writers:
                    writer.start()
                code = self._wait_for_all(parts, log, on_poll, stop)
                for writer in writers:
                    writer.join(timeout=10)
                return code

    # -- containers

    @contextmanager
    def _containers(
        self, options: Mapping[str, Any], meeting: str, run: RunDir, plan: Plan, address: str, log: _SharedLog,
        on_poll: Callable[[], None], stop: StopSignals,
    ) -> Iterator[list[_Part]]:
        """Makes a container on every machine, with all that it reads in place; removes them at the end."""
        parts: list[_Part] = []
        try:
            ours = {**options, "command": [*options["command"], "--node", f"0/{meeting}"]}
            parts.append(_Part(name=_HERE, container=create_container(self._client, **ours), far=False))
            for number, peer in enumerate(self._peers, 1):
                theirs = self._for_peer(options, peer, plan)
                interface = self._equip(peer, theirs, run, plan, address, log, on_poll, stop)
                theirs["environment"] |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
                theirs["command"] = [*options["command"], "--node", f"{number}/{meeting}"]
                with answering(peer.host):
                    container = create_container(self._clients[peer.host], where=peer.host, **theirs)
                parts.append(_Part(name=peer.host, container=container, far=True))
            yield parts
        finally:
            for part in parts:
                with suppress(Exception):  # already gone, or its engine is: nothing is left to remove
                    part.container.remove(force=True)

    def _for_peer(self, options: Mapping[str, Any], peer: Peer, plan: Plan) -> dict[str, Any]:
        """Returns a container's options for another machine: its own user, no token, nothing from the hub."""
        token = {host for host, there in options["volumes"].items() if there["bind"].startswith("/run/secrets/")}
        return {
            **options, "user": f"{peer.uid}:{peer.gid}",
            "volumes": {host: there for host, there in options["volumes"].items() if host not in token},
            "environment": {k: v for k, v in environment_of(False).items() if k != "OMP_NUM_THREADS"},
            "devices": rdma_devices(peer.infiniband).get("devices", []),
        }

    def _equip(
        self, peer: Peer, options: Mapping[str, Any], run: RunDir, plan: Plan, address: str, log: _SharedLog,
        on_poll: Callable[[], None], stop: StopSignals,
    ) -> str:
        """Sends a peer what it lacks. Returns the name of its interface on the way to this machine.

        Raises:
            PreflightError: it cannot be given what it needs.
        """
        client, paths = self._clients[peer.host], inputs_of(run, plan)
        written = [folder for folder, mode in mounts_of(run, plan).items() if mode == "rw"]
        folders = [folder for folder in options["volumes"] if Path(folder).is_dir()]
        asked = {"files": paths, "written": written, "towards": address, "given": folders}
        open_options = {
            **options, "name": f"{options['name']}-inputs",
            "volumes": {folder: {**there, "mode": "rw"} for folder, there in options["volumes"].items()},
        }
        open_options.pop("device_requests", None)  # a look needs no GPU
        make_folders(peer, folders)
        container, found = look(client, open_options, {**asked, "clear": paths}, peer.host)
        try:
            if found["new"]:
                self._give(client, open_options, found["new"], peer)
            if left := sorted(set(found["refused"]) - set(found["new"])):
                raise PreflightError(
                    f"On {peer.host} a run should write to {', '.join(left)} as user {peer.uid}, as it does here; it "
                    f"may not. Give these folders to that user over there: sudo chown {peer.uid}:{peer.gid} FOLDER."
                )
            with at_home("read what a run reads"):
                own = known_files(paths)
            lacking = [path for path in own if found["files"].get(path) != own[path]]
            for path in lacking:  # a file gets its name as the user; folders below a mount are sent with their owner
                if own[path][0] != "link" and os.path.dirname(path) in found["closed"]:
                    raise _unwritable(peer, path)
            if not lacking and not found["new"]:
                return _interface(found, peer, address)
            with self._cleared_after_failure(peer, open_options, asked):
                for root in paths:
                    wrong = [path for path in lacking if path == root or path.startswith(root + "/")]
                    if not wrong:
                        continue
                    base = mounted_above(root, options["volumes"])
                    log.line(f"{peer.host} gets {len(wrong)} files of {root}".encode())
                    names = {str(Path(path).relative_to(base)): own[path][0] == "link" for path in wrong}
                    send_files(container, base, names, peer, lambda event: on_poll(), lambda: stop.count > 0)
                with answering(peer.host):
                    container.remove(force=True)
                container, found = look(client, open_options, {**asked, "finish": lacking}, peer.host)
                if unfinished := found["unfinished"]:
                    raise _unwritable(peer, unfinished[0])
                if still := [path for path in lacking if found["files"].get(path) != own[path]]:
                    raise PreflightError(f"{still[0]} was sent to {peer.host} and is another file there. Is its disk "
                                         "sound, and does nobody else write there?")
            return _interface(found, peer, address)
        finally:
            with suppress(Exception):  # already gone, or the engine is
                container.remove(force=True)

    @contextmanager
    def _cleared_after_failure(
        self, peer: Peer, options: Mapping[str, Any], asked: Mapping[str, Any]
    ) -> Iterator[None]:
        """Leaves no half of a file over there when sending fails or is stopped; the next start looks for them too."""
        try:
            yield
        except BaseException:
            clear = {"files": [], "written": [], "towards": asked["towards"], "clear": asked["files"]}
            with suppress(Exception):  # it went away
                container, _ = look(self._clients[peer.host], {**options, "name": f"{options['name']}-clear"}, clear,
                                    peer.host)
                container.remove(force=True)
            raise

    def _give(self, client: Any, options: Mapping[str, Any], folders: list[str], peer: Peer) -> None:
        """Gives folders that its engine has just made, which belong to root and are empty, to the peer's user."""
        with answering(peer.host):
            container = create_container(client, where=peer.host, **{
                **options, "command": ["chown", "--", f"{peer.uid}:{peer.gid}", *folders], "user": "0:0",
                "cap_add": ["CHOWN"], "name": f"{options['name']}-owner",
            })
            try:
                start_container(container, where=peer.host)
                if container.wait()["StatusCode"] != 0:
                    raise PreflightError(f"{peer.host} could not make {', '.join(folders)} for its user: "
                                         f"{container.logs().decode('utf-8', 'replace')[-300:]}")
            finally:
                with suppress(Exception):  # already gone, or the engine is
                    container.remove(force=True)

    def _end_leftovers(self, run: RunDir) -> None:
        super()._end_leftovers(run)
        for host, client in self._clients.items():
            with answering(host):
                for container in client.containers.list(all=True, filters={"label": f"{RUN_LABEL}={run.root}"}):
                    container.remove(force=True)

    # -- waiting

    def _wait_for_all(
        self, parts: list[_Part], log: _SharedLog, on_poll: Callable[[], None], stop: StopSignals
    ) -> int:
        """Waits until every machine's ranks have ended. Returns this machine's exit code, or the first bad one."""
        passed_on, said = False, set()
        ending: tuple[int, float] | None = None
        """The first exit code that ends the training everywhere, and when it was seen."""
        while any(part.code is None for part in parts):
            if stop.count and not passed_on:
                passed_on = True
                for part in parts:
                    part.signal("SIGINT")
            if stop.count > 1:
                for part in parts:
                    part.signal("SIGKILL")
                return int(ExitCode.INTERRUPTED)
            for part in parts:
                part.look()
                if part.code is not None and part.name not in said:
                    said.add(part.name)
                    log.line(f"The ranks on {part.name} ended with exit code {part.code}.".encode())
                    if ending is None and (part.code or not part.far):
                        ending = part.code, time.monotonic()
            if ending is not None and time.monotonic() - ending[1] > _LEFT_ALONE_S:
                for part in parts:
                    if part.code is None:
                        log.line(f"The ranks on {part.name} did not end by themselves; they are killed.".encode())
                        part.signal("SIGKILL")
                        part.code = ending[0]
            on_poll()
            time.sleep(_POLL_S)
        codes = [int(part.code or 0) for part in parts]
        return codes[0] or (ending[0] if ending else 0) or max(codes)


