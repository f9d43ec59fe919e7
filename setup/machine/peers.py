"""A second machine: reached by ssh, its Docker engine through it, and what it must be given before it can train.

Everything goes through ssh as the user has set it up: names, keys and known hosts are ssh's. Its files are written by
its engine, as the user that ssh logs in as; no line of a shell is built from anything that was typed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparktune.setup.machine.engine import (
    ENGINE_TIMEOUT_S,
    INFINIBAND,
    create_container,
    refuse_other_ids,
    start_container,
)
from sparktune.setup.machine.image_build import Cancelled
from sparktune.setup.machine.inventory import MARK, PARTIAL
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.links import address_of, interface_of

__all__ = [
    "Peer",
    "answering",
    "at_home",
    "look",
    "make_folders",
    "reach",
    "reachable_boxes",
    "send_files",
    "send_image",
    "tar_stream",
]

_CONNECT_S = 10
_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
"""ssh ends 15 s after the other machine's last word."""
_BEGIN = "sparktune asks"
_LOOK = (
    f"echo {_BEGIN}; id -u; id -g; date +%s; uname -m; test -e {INFINIBAND} && echo rdma || echo none; "
    "docker version --format {{.Server.Version}}"
)
"""Everything that is asked of the far end's shell; what its start-up files print comes before."""
_ANSWERED = 0x2
"""Flag of a neighbour whose address is known."""
_CABLE_MEGABITS = 40_000
_MOST_ASKED = 4
_CHUNK = 4 * 2**20
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another machine that answers."""

    host: str
    """As the user named it: [USER@]HOST[:PORT]."""
    address: str
    """Its IPv4 address, as ssh resolves the name."""
    uid: int
    gid: int
    clock_off_s: float
    """Its clock minus ours."""
    clock_known_s: float
    """How far that may be off: the time that the question took."""
    arch: str
    engine: str
    """Version of its Docker engine."""
    infiniband: bool = False
    """It has devices for RDMA."""

    def client(self) -> Any:
        """Returns a `docker.DockerClient` of its engine: the SDK's ssh transport, by the user's own ssh.

        Raises:
            PreflightError: it went away, or its engine cannot serve this user.
        """
        from docker.client import DockerClient

        _give_ssh_a_deadline()
        with answering(self.host):
            client = DockerClient(base_url=f"ssh://{self.host}", use_ssh_client=True, timeout=ENGINE_TIMEOUT_S)
            refuse_other_ids(client, f"of {self.host}")
        return client


@cache
def _give_ssh_a_deadline() -> None:
    """Replaces, once, how the docker SDK starts ssh: its own never asks whether the other machine is alive.

    A read from one that fell silent would not end, whatever the SDK's timeout says. No password is asked for, nothing
    said on the screen, and Ctrl-C is left to us.
    """
    from docker.transport import sshconn

    class PatientSocket(sshconn.SSHSocket):
        def connect(self, **_: Any) -> None:
            host = "".join([f"{self.user}@" if self.user else "", self.host, f":{self.port}" if self.port else ""])
            # as the SDK does: what a packed program sets for its own libraries is not the system's ssh's
            env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "SSL_CERT_FILE")}
            self.proc = subprocess.Popen(
                [*_ssh(host, *_ALIVE), "docker system dial-stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True, env=env,
            )

        def close(self) -> None:
            with suppress(OSError):  # its last words to a machine that went away
                super().close()

    sshconn.SSHSocket = PatientSocket


@contextmanager
def answering(host: str) -> Iterator[None]:
    """Turns what the docker SDK raises when another machine goes away into one sentence.

    Raises:
        PreflightError: it did, or its engine refused.
    """
    from docker.errors import DockerException

    try:
        yield
    except (DockerException, OSError) as error:
        raise PreflightError(
            f"{host} or its Docker engine went away, or refused: {str(error) or type(error).__name__}. Look at the "
            "cable and at the machine (./run.sh doctor --peers), then resume."
        ) from error


@contextmanager
def at_home(doing: str) -> Iterator[None]:
    """Turns what this machine's files and engine refuse into a sentence: else it would be told as another machine's.

    Args:
        doing: what could not be done, as "read FILE".

    Raises:
        PreflightError: a file is gone, a disk is full, its own engine went away.
    """
    from docker.errors import DockerException

    try:
        yield
    except (DockerException, OSError) as error:
        raise PreflightError(f"This machine could not {doing}: {error}. Mend that here, then resume.") from error


def _ssh(host: str, *options: str) -> list[str]:
    """Returns ssh's argument list up to the host; the schema has refused what could be an option."""
    name, _, port = host.partition(":")
    return ["ssh", "-o", "BatchMode=yes", *options, "-o", f"ConnectTimeout={_CONNECT_S}",  # ssh takes the first
            *(("-p", port) if port else ()), "--", name]


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    # a session of its own: Ctrl-C is ours to answer, and would be taken for a refusal of the other machine
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=3 * _CONNECT_S,
                          check=False, start_new_session=True)


def reach(host: str) -> Peer:
    """Logs in to a machine without a password and looks at who we are there, its clock and its engine.

    Raises:
        PreflightError: it cannot be reached, asks for something, or has no engine that this user may use.
    """
    try:
        settings = _run([*_ssh(host, "-G")]).stdout
        before = time.time()
        done = _run([*_ssh(host), _LOOK])
        after = time.time()
    except FileNotFoundError as error:
        raise PreflightError("--peers needs ssh, which is not here: sudo apt-get install openssh-client.") from error
    except subprocess.TimeoutExpired as error:
        raise PreflightError(f"{host} should answer ssh; it did not within {3 * _CONNECT_S} s. Look at its cable and "
                             "address.") from error
    lines, said = done.stdout.partition(_BEGIN + "\n")[2].split("\n"), done.stderr.strip().splitlines()
    last = said[-1] if said else "it said nothing"
    if len(lines) < 5 or not all(line.isdigit() for line in lines[:3]):
        raise PreflightError(
            f"{host} should let this user in by ssh without a password; it did not ({last}). Set it up once: "
            f"ssh-copy-id {host.partition(':')[0]}, then log in once by hand to accept its key."
        )
    if len(lines) < 6 or not lines[5].strip():
        raise PreflightError(
            f"{host} should have a Docker engine that its user may use; `docker version` there says: {last}. Install "
            "it (sudo apt-get install docker.io) and join its group (sudo usermod -aG docker $USER) over there."
        )
    name = re.search(r"^hostname (\S+)$", settings, re.M)
    return Peer(
        host=host, address=address_of(name[1] if name else host.partition(":")[0].rpartition("@")[2]),
        # whole seconds: half a one is added, and half a one is not known
        uid=int(lines[0]), gid=int(lines[1]), clock_off_s=int(lines[2]) + 0.5 - (before + after) / 2,
        clock_known_s=(after - before) / 2 + 0.5, arch=lines[3], engine=lines[5].strip(), infiniband=lines[4] == "rdma",
    )


def reachable_boxes(
    lets_in: Callable[[str], bool] | None = None, neighbours: Path = Path("/proc/net/arp"), folder: Path | None = None
) -> list[str]:
    """Returns the addresses of machines beside this one that it could train with: those to offer, not all there are.

    Looked at are the neighbours that the kernel has talked to over an interface of at least 40 Gb/s (the cable between
    two boxes, not the office's network), a few of them, and whether ssh lets this user in without asking.

    Args:
        lets_in: says so of an address; asks ssh when left out.
        neighbours: /proc/net/arp.
        folder: /sys/class/net.
    """
    found: list[str] = []
    try:
        lines = neighbours.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return []
    for line in lines:
        fields = line.split()
        if len(fields) < 6 or not int(fields[2], 16) & _ANSWERED:
            continue
        interface = interface_of(fields[5], folder) if folder else interface_of(fields[5])
        if interface.up and (interface.megabits or 0) >= _CABLE_MEGABITS and fields[0] not in found:
            found.append(fields[0])
    return [address for address in found[:_MOST_ASKED] if (lets_in or _lets_in)(address)]


def _lets_in(address: str) -> bool:
    try:
        return subprocess.run([*_ssh(address, "-o", "ConnectTimeout=2"), "true"], capture_output=True, check=False,
                              stdin=subprocess.DEVNULL, timeout=5).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _told(
    chunks: Iterable[bytes], total: int, what: str, on_event: OnEvent, should_stop: Callable[[], bool]
) -> Iterator[bytes]:
    """Yields what is sent, chunk by chunk, and says how far it is.

    Raises:
        Cancelled: `should_stop` said so.
    """
    done, begun = 0, time.monotonic()
    for chunk in chunks:
        if should_stop():
            raise Cancelled(f"Sending {what} was stopped.")
        done += len(chunk)
        with at_home("write its records"):
            on_event({"kind": "progress", "phase": f"sending {what}", "done": min(done, total), "total": total,
                      "unit": "bytes", "elapsed_s": round(time.monotonic() - begun, 1)})
        yield chunk


# -- the image


def send_image(
    ours: Any, theirs: Any, tag: str, host: str, on_event: OnEvent, should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Makes sure that a machine has the same image under the same tag. Returns whether it had to be sent.

    Args:
        ours: the engine here.
        theirs: the engine there.
        tag: the content tag.
        host: its name, for messages.
        on_event: takes progress.
        should_stop: True cancels.

    Raises:
        PreflightError: what arrived is another image; one of the engines went away or refused.
        Cancelled: `should_stop` said so.
    """
    from docker.errors import APIError, ImageNotFound

    with at_home(f"find the image {tag}"):
        image = ours.images.get(tag)
    with answering(host):
        with suppress(ImageNotFound):
            if theirs.images.get(tag).id == image.id:
                return False
        sent = _told(_saved(image, tag), int(image.attrs["Size"]), f"the image to {host}", on_event, should_stop)
        try:
            list(theirs.api.load_image(sent) or ())
            arrived = theirs.images.get(tag).id
        except APIError as error:
            raise PreflightError(f"The engine of {host} would not take the image {tag}: {error}") from error
    if arrived != image.id:
        raise PreflightError(
            f"The image {tag} should be {image.id} on {host} too; there it became {arrived}. The engines keep images "
            "differently (containerd's store on one of them?); use the same kind on both."
        )
    return True


def _saved(image: Any, tag: str) -> Iterator[bytes]:
    with at_home(f"read the image {tag} from its Docker engine"):
        yield from image.save(chunk_size=_CHUNK, named=tag)


# -- files


def tar_stream(root: Path, names: Mapping[str, bool], uid: int, gid: int) -> Iterator[bytes]:
    """Yields a tar archive of files and links below `root`, and of the folders that hold them, owned by uid and gid.

    Files are called NAME + PARTIAL: what is cut off on its way is never taken for the whole (setup/machine/inventory.py
    gives them their names).

    Args:
        root: the folder.
        names: of the files, relative to it -> whether it is a link to be sent as one.
        uid: their owner over there.
        gid: their group.

    Raises:
        PreflightError: a file changed while it was read, or cannot be read.
    """
    folders: list[str] = []
    for name in names:
        for parent in reversed(Path(name).parents):
            if str(parent) != "." and str(parent) not in folders:
                folders.append(str(parent))
    for name in [*folders, *names]:
        path, info = root / name, tarfile.TarInfo(name)
        info.uid, info.gid, info.mode = uid, gid, 0o755
        with at_home(f"read {path}"):
            if name in folders:
                info.type = tarfile.DIRTYPE
            elif names[name]:
                info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
            else:
                facts, info.name = path.stat(), name + PARTIAL
                info.size, info.mtime, info.mode = facts.st_size, facts.st_mtime, facts.st_mode & 0o755
            yield info.tobuf(format=tarfile.PAX_FORMAT)
            if info.size:
                yield from _content(path, info.size)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _content(path: Path, size: int) -> Iterator[bytes]:
    """Yields a file's bytes, as many as were announced, and zeros up to a whole block."""
    left = size
    with path.open("rb") as file:
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise PreflightError(f"{path} became shorter while it was sent. Start again when it is done.")
            left -= len(chunk)
            yield chunk
    yield b"\0" * (-size % tarfile.BLOCKSIZE)


def send_files(
    container: Any, root: Path, names: Mapping[str, bool], peer: Peer, on_event: OnEvent,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Writes files below `root` to the same place on another machine.

    Args:
        container: over there, with that folder mounted; it need not run.
        root: the folder.
        names: of the files, relative to it -> whether it is a link to be sent as one.
        peer: the machine.
        on_event: takes progress.
        should_stop: True cancels.

    Raises:
        PreflightError: its engine refused or went away; a file here cannot be read.
        Cancelled: `should_stop` said so.
    """
    from docker.errors import APIError

    with at_home(f"read the files of {root}"):
        total = sum((root / name).stat(follow_symlinks=not is_link).st_size for name, is_link in names.items())
    sent = _told(tar_stream(root, names, peer.uid, peer.gid), total, f"{root} to {peer.host}", on_event, should_stop)
    with answering(peer.host):
        try:
            container.put_archive(str(root), sent)
        except APIError as error:
            why = error.explanation or error
            raise PreflightError(f"{peer.host} would not take the files of {root}: {why}") from error


def make_folders(peer: Peer, folders: Sequence[str]) -> None:
    """Makes folders on another machine as the user that ssh logs in as: its engine would make them as root.

    What cannot be made is said by the inventory, which looks whether they can be written to.
    """
    with suppress(subprocess.TimeoutExpired):
        subprocess.run([*_ssh(peer.host), "xargs -0 mkdir -p --"], input="\0".join(folders), text=True, check=False,
                       capture_output=True, timeout=3 * _CONNECT_S, start_new_session=True)


# -- what it has


def look(client: Any, options: Mapping[str, Any], asked: Mapping[str, Any], host: str) -> tuple[Any, dict[str, Any]]:
    """Runs the inventory in a container and returns the container, which has ended, and the answer.

    Raises:
        NoGPUs: they were asked for, and its engine cannot give any.
        PreflightError: it could not be made, or said nothing.
    """
    command = ["python", "-P", "-m", "sparktune.setup.machine.inventory", json.dumps(asked)]
    with answering(host):
        container = create_container(client, where=host, **{**options, "command": command})
        try:
            start_container(container, where=host)
            container.wait()
            said = container.logs().decode("utf-8", "replace")
            answers = [line.partition(MARK)[2] for line in said.splitlines() if MARK in line]
            if not answers:
                raise PreflightError(f"{host} should say what it has; its container said: {said[-800:]}")
            return container, json.loads(answers[-1])
        except BaseException:
            with suppress(Exception):  # already gone, or the engine is
                container.remove(force=True)
            raise
