"""The doctor's checks of the other machines of --peers, and of what joins them to this one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from sparktune.setup.machine.boxes import free_port, link_of
from sparktune.setup.machine.check import Check, guarded
from sparktune.setup.machine.detect import host_memory_gib, nvidia_gpus
from sparktune.setup.machine.docker_backend import container_base
from sparktune.setup.machine.engine import NoGPUs, connect, create_container, start_container
from sparktune.setup.machine.peers import Peer, answering, look, reach
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.links import MEASURED, Interface, interface_of
from sparktune.setup.plan.schema import Plan

__all__ = ["bandwidth_check", "peer_checks"]

_CLOCK_S = 5.0
_ALIKE = 0.75
"""The smaller of two memories, over the larger: less, and the larger one's plan may not fit."""
_SLOW_MEGABITS = 10_000
_SHARE = {"nccl": 0.6, "gloo": 0.05}
"""Of the interface's speed, what a sum should reach at least: NCCL over RDMA, gloo over one TCP stream."""
_MEASURE_S = 240.0


def _image(client: Any, name: str) -> str | None:
    """Returns the id of an image on an engine, by its name or its id; None where it is not there."""
    from docker.errors import ImageNotFound

    try:
        return str(client.images.get(name).id)
    except ImageNotFound:
        return None


def _newest(plan: Plan) -> str | None:
    """Returns the id of this machine's newest image of the plan's stack: the one that a run sends to the others."""
    return _image(connect(), f"sparktune:{plan.stack}-opt")


def peer_checks(plan: Plan) -> list[Check]:
    """Looks at every machine of --peers: ssh, engine, clock, architecture, image, link, memory and disk."""
    found: list[Check] = []
    for host in plan.peers:
        reached: list[Peer] = []

        def ssh(host: str = host, reached: list[Peer] = reached) -> Check:
            reached.append(reach(host))
            seen = f"lets us in as user {reached[0].uid}, address {reached[0].address}, Docker {reached[0].engine}"
            return Check(name=f"{host}: ssh", status="ok", seen=seen)

        found.append(guarded(f"{host}: ssh", ssh))
        if reached:
            checks: dict[str, Callable[[Peer, Plan], list[Check]]] = {
                "clock": _clock, "architecture": _architecture, "image": _far_end,
            }
            for name, check in checks.items():
                found += _several(f"{host}: {name}", partial(check, reached[0], plan))
    return found


def _several(name: str, checks: Callable[[], list[Check]]) -> list[Check]:
    made: list[Check] = []

    def first() -> Check:
        made.extend(checks())
        return made[0]

    check = guarded(name, first)
    return made or [check]


def _clock(peer: Peer, plan: Plan) -> list[Check]:
    seen = f"{peer.clock_off_s:+.1f} s from ours (known to {peer.clock_known_s:.1f} s)"
    if abs(peer.clock_off_s) > _CLOCK_S + peer.clock_known_s:
        return [Check(name=f"{peer.host}: clock", status="warning", seen=seen,
                      fix="Logs of both will not line up: let both keep time (sudo timedatectl set-ntp true).")]
    return [Check(name=f"{peer.host}: clock", status="ok", seen=seen)]


def _architecture(peer: Peer, plan: Plan) -> list[Check]:
    here = os.uname().machine
    if peer.arch != here:
        return [Check(name=f"{peer.host}: architecture", status="failed", seen=f"{peer.arch}, here it is {here}",
                      fix="An image fits one architecture: train on machines of one kind.")]
    return [Check(name=f"{peer.host}: architecture", status="ok", seen=peer.arch)]


def _far_end(peer: Peer, plan: Plan) -> list[Check]:
    """The image over there, and what a container of it sees: interface, memory, disk, GPUs."""
    name = f"{peer.host}: image"
    address, interface = link_of([peer])
    ours, client = _newest(plan), peer.client()
    with answering(peer.host):
        theirs = ours and _image(client, ours)
    near = interface_of(interface)
    if theirs is None or ours is None:
        where = "there" if ours else "here"
        return [
            Check(name=name, status="ok", seen=f"no image {where} yet; the first run makes it here and sends it"),
            _link(peer, near, None),
        ]
    checks = [Check(name=name, status="ok", seen="the same image id as here")]
    gpus = plan.device != "cpu" and bool(nvidia_gpus())
    try:
        found = _look_around(client, peer, theirs, address, gpus=gpus)
    except NoGPUs as error:  # a run would end there; what else is to be mended is said with it
        checks.append(Check(name=f"{peer.host}: GPUs", status="failed", seen=str(error)))
        found = _look_around(client, peer, theirs, address, gpus=False)
        gpus = False
    far = None if found["interface"] is None else Interface(**found["interface"])
    return [*checks, _link(peer, near, far), *_twins(peer, found, gpus=gpus)]


def _look_around(client: Any, peer: Peer, image: str, towards: str, *, gpus: bool) -> dict[str, Any]:
    """Runs the inventory over there."""
    options = container_base("look", f"{peer.uid}:{peer.gid}", gpus=gpus) | {"image": image, "network_mode": "host"}
    container, found = look(client, options, {"files": [], "written": ["/"], "towards": towards}, peer.host)
    with suppress(Exception):  # it has ended, and the engine is gone: a name and an exit code are left there
        container.remove(force=True)
    return found


def _link(peer: Peer, near: Interface, far: Interface | None) -> Check:
    def said(interface: Interface) -> str:
        speed = "no speed said" if interface.megabits is None else f"{interface.megabits / 1000:g} Gb/s"
        return f"{interface.name} {'up' if interface.up else 'down'}, {speed}"

    name = f"{peer.host}: link"
    seen = f"here {said(near)}; there {said(far) if far else 'not looked at, for there is no image'}"
    if not near.up or (far is not None and not far.up):
        return Check(name=name, status="failed", seen=seen, fix="Look at the cable; sudo ip link set INTERFACE up.")
    slowest = min((i.megabits for i in (near, far) if i is not None and i.megabits is not None), default=None)
    if slowest is not None and slowest < _SLOW_MEGABITS:
        return Check(
            name=name, status="warning", seen=seen,
            fix="Full fine-tuning sends gigabytes a step: give the peers' addresses on the fast link (on a Spark the "
            "ConnectX interface that ibdev2netdev calls Up).",
        )
    return Check(name=name, status="ok", seen=seen)


def _twins(peer: Peer, found: dict[str, Any], *, gpus: bool) -> list[Check]:
    """Memory, disk and, where a run asks for them, GPUs beside ours: a plan made here must fit over there."""
    mine, theirs = host_memory_gib(), float(found["memory_gib"])
    ours = [gpu for gpu, _, _ in nvidia_gpus()] if gpus else found["gpus"]
    seen = f"{theirs:.1f} GiB free, here {mine:.1f}"
    if gpus:
        seen += f"; GPUs {', '.join(found['gpus']) or 'none'}"
    alike = min(mine, theirs) >= _ALIKE * max(mine, theirs)
    memory = Check(name=f"{peer.host}: memory", status="ok", seen=seen)
    if found["gpus"] != ours:
        memory = Check(name=memory.name, status="warning", seen=f"{seen}, here {', '.join(ours) or 'none'}",
                       fix="Every step waits for the slower one, and the plan is made for this machine's memory.")
    elif theirs < mine and not alike:
        memory = Check(name=memory.name, status="warning", seen=seen,
                       fix="The plan is made for this machine's memory: end what runs over there.")
    disk = float(found["disk_gib"])
    return [memory, Check(name=f"{peer.host}: disk", status="ok" if disk > 1 else "warning",
                          seen=f"{disk:.1f} GiB free", fix="" if disk > 1 else "Free some space over there.")]


# -- what the link carries


def bandwidth_check(plan: Plan) -> Check:
    """Measures a large sum between containers on all machines, and holds it against the interface's speed."""
    return guarded("bandwidth", lambda: _bandwidth(plan))


def _bandwidth(plan: Plan) -> Check:
    peers = [reach(host) for host in plan.peers]
    clients = [connect(), *(peer.client() for peer in peers)]
    image = _newest(plan)
    if image is None or not all(_image(client, image) for client in clients):
        return Check(name="bandwidth", status="ok", seen="not measured: there is no image on every machine yet",
                     fix="The first run makes and sends it; then ask the doctor again.")
    address, interface = link_of(peers)
    meeting = f"{len(clients)}@{address}:{free_port(address)}"
    users = [f"{os.getuid()}:{os.getgid()}", *(f"{peer.uid}:{peer.gid}" for peer in peers)]
    places = ["", *(peer.host for peer in peers)]
    gpus = plan.device != "cpu" and bool(nvidia_gpus())
    containers: list[Any] = []
    try:
        for i, (client, user, place) in enumerate(zip(clients, users, places, strict=True)):
            command = ["python", "-P", "-m", "sparktune.training.linktest", "--node", f"{i}/{meeting}"]
            options = container_base("link", user, gpus=gpus) | {"image": image, "network_mode": "host"}
            options["command"] = command if gpus else [*command, "--cpu"]
            with answering(place or "this machine"):
                containers.append(create_container(client, where=place, **options))
        for container, place in zip(reversed(containers), reversed(places), strict=True):
            with answering(place or "this machine"):
                start_container(container, where=place)
        answer = _answer(containers)
    finally:
        for container in containers:
            with suppress(Exception):  # already gone, or its engine is
                container.remove(force=True)
    return _judged(answer, interface_of(interface))


def _answer(containers: list[Any]) -> dict[str, Any]:
    deadline = time.monotonic() + _MEASURE_S
    while time.monotonic() < deadline:
        for container in containers:
            container.reload()
        codes = [int(c.attrs["State"]["ExitCode"]) for c in containers if c.status in ("exited", "dead")]
        if len(codes) == len(containers) or any(codes):
            break
        time.sleep(0.5)
    said = [container.logs().decode("utf-8", "replace") for container in containers]
    lines = [line.partition(MEASURED)[2] for line in said[0].splitlines() if MEASURED in line]
    if not lines:
        raise PreflightError("The link should have been measured by a container on each machine; they said: "
                             + " | ".join(text.strip()[-300:] for text in said))
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _judged(answer: dict[str, Any], interface: Interface) -> Check:
    backend, rate = str(answer["backend"]), float(answer["bytes_per_s"])
    seen = f"{rate / 1e9:.2f} GB/s sent by each rank over {interface.name}, {backend}, {answer['ranks']} ranks"
    if backend == "gloo":
        seen += " (no GPU took part: this is the way through the kernel, not what NCCL gives)"
    if interface.megabits is None:
        return Check(name="bandwidth", status="ok", seen=f"{seen}; the interface says no speed to hold it against")
    should = interface.megabits * 1e6 / 8
    seen += f"; the link gives {should / 1e9:.1f} GB/s at most"
    if rate < _SHARE[backend] * should:
        return Check(
            name="bandwidth", status="warning", seen=seen,
            fix=f"Expected at least {_SHARE[backend] * should / 1e9:.2f} GB/s. Is it the right interface, is the other "
            "half of a ConnectX port idle, does RDMA work (ibv_devinfo, ulimit -l unlimited)? NCCL_DEBUG=INFO tells "
            "the way that NCCL took.",
        )
    return Check(name="bandwidth", status="ok", seen=seen)
