"""The doctor's judgement of other machines: clock, kind, link, memory, and what a sum over the link should reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sparktune.setup.machine import peer_checks as checks
from sparktune.setup.machine.engine import NoGPUs
from sparktune.setup.machine.peers import Peer
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.links import Interface
from sparktune.setup.plan.schema import Plan

CABLE = Interface(name="enp1s0f0np0", up=True, megabits=200_000)
OFFICE = Interface(name="enP7s7", up=True, megabits=1_000)
DEAD = Interface(name="enp1s0f1np1", up=False, megabits=None)
VIRTUAL = Interface(name="veth0", up=True, megabits=None)


def peer(**changes: Any) -> Peer:
    values = {"host": "b", "address": "192.168.100.2", "uid": 1, "gid": 1, "clock_off_s": 0.1, "clock_known_s": 0.2,
              "arch": "aarch64", "engine": "28"}
    return Peer(**{**values, **changes})


@pytest.mark.parametrize(("off", "known", "status"), [(0.1, 0.2, "ok"), (-4.0, 0.1, "ok"), (9.0, 0.1, "warning"),
                                                      (9.0, 5.0, "ok"), (-3600.0, 0.1, "warning")])
def test_clocks(off: float, known: float, status: str) -> None:
    (found,) = checks._clock(peer(clock_off_s=off, clock_known_s=known), Plan())
    assert found.status == status


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.os, "uname", lambda: type("U", (), {"machine": "x86_64"}))
    assert checks._architecture(peer(), Plan())[0].status == "failed"
    assert checks._architecture(peer(arch="x86_64"), Plan())[0].status == "ok"


@pytest.mark.parametrize(("near", "far", "status"), [
    (CABLE, CABLE, "ok"), (CABLE, None, "ok"), (CABLE, DEAD, "failed"), (DEAD, CABLE, "failed"),
    (OFFICE, CABLE, "warning"), (CABLE, OFFICE, "warning"), (VIRTUAL, VIRTUAL, "ok"),
])
def test_both_ends_of_the_link(near: Interface, far: Interface | None, status: str) -> None:
    found = checks._link(peer(), near, far)
    assert found.status == status
    assert near.name in found.seen
    assert ("not looked at" in found.seen) == (far is None)


@pytest.mark.parametrize(("backend", "rate", "interface", "status"), [
    ("nccl", 21e9, CABLE, "ok"), ("nccl", 9e9, CABLE, "warning"), ("gloo", 1.5e9, CABLE, "ok"),
    ("gloo", 0.1e9, CABLE, "warning"), ("gloo", 0.1e9, VIRTUAL, "ok"),
])
def test_what_the_link_carried_against_what_it_gives(
    backend: str, rate: float, interface: Interface, status: str
) -> None:
    found = checks._judged({"backend": backend, "bytes_per_s": rate, "ranks": 2}, interface)
    assert found.status == status
    assert backend in found.seen
    assert ("no GPU took part" in found.seen) == (backend == "gloo")
    assert ("25.0 GB/s at most" in found.seen) == (interface is CABLE)


@pytest.mark.parametrize(("memory", "gpus", "mine", "status"), [
    (100.0, ["GB10"], ["GB10"], "ok"), (50.0, ["GB10"], ["GB10"], "warning"), (100.0, ["H200"], ["GB10"], "warning"),
    (200.0, [], [], "ok"), (100.0, [], ["GB10"], "warning"),
])
def test_a_twin_or_not(
    monkeypatch: pytest.MonkeyPatch, memory: float, gpus: list[str], mine: list[str], status: str
) -> None:
    monkeypatch.setattr(checks, "host_memory_gib", lambda: 100.0)
    monkeypatch.setattr(checks, "nvidia_gpus", lambda: [(name, "12.1", None) for name in mine])
    found, disk = checks._twins(peer(), {"memory_gib": memory, "gpus": gpus, "disk_gib": 0.5}, gpus=bool(mine))
    assert found.status == status
    assert disk.status == "warning"


class Silent:
    """An engine over there that has the image."""

    images = SimpleNamespace(get=lambda name: SimpleNamespace(id="sha256:1"))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was asked of an engine that cannot give GPUs: whether a container was to have them."""
    asked: list[bool] = []

    def look(client: Any, options: dict[str, Any], wanted: dict[str, Any], host: str) -> tuple[Any, dict[str, Any]]:
        asked.append("device_requests" in options)
        if asked[-1]:
            raise NoGPUs(f"The Docker engine of {host} has no way to give. Install NVIDIA's container toolkit")
        answer = {"memory_gib": 100.0, "gpus": [], "disk_gib": 9.0, "interface": None}
        return SimpleNamespace(remove=lambda force: None), answer

    monkeypatch.setattr(checks, "look", look)
    monkeypatch.setattr(checks, "nvidia_gpus", lambda: [("GB10", "12.1", None)])
    monkeypatch.setattr(checks, "host_memory_gib", lambda: 100.0)
    monkeypatch.setattr(checks, "link_of", lambda peers: ("192.168.100.1", "lo"))
    monkeypatch.setattr(checks, "interface_of", lambda name: CABLE)
    monkeypatch.setattr(checks, "_newest", lambda plan: "sha256:1")
    monkeypatch.setattr(Peer, "client", lambda self: Silent())
    return asked


def test_an_engine_that_can_give_no_gpus_fails_with_its_cure(looks: list[bool]) -> None:
    """A run would end at its start there; memory, disk and link are looked at all the same."""
    found = {check.name: check for check in checks._far_end(peer(), Plan())}
    assert looks == [True, False]
    assert found["b: GPUs"].status == "failed"
    assert "Install NVIDIA's container toolkit" in found["b: GPUs"].seen
    assert {check.status for name, check in found.items() if name != "b: GPUs"} == {"ok"}


def test_a_run_on_the_cpu_asks_for_no_gpus(looks: list[bool]) -> None:
    assert {check.status for check in checks._far_end(peer(), Plan(device="cpu"))} == {"ok"}
    assert looks == [False]


def test_what_else_fails_over_there_is_not_tried_again(looks: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        looks.append(True)
        raise PreflightError("no room")

    monkeypatch.setattr(checks, "look", refuse)
    with pytest.raises(PreflightError, match="no room"):
        checks._far_end(peer(), Plan())
    assert looks == [True]


def test_a_machine_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(host: str) -> Peer:
        raise PreflightError(f"{host} should let this user in")

    monkeypatch.setattr(checks, "reach", refuse)
    (found,) = checks.peer_checks(Plan(peers=["b"]))
    assert (found.name, found.status, found.seen) == ("b: ssh", "failed", "b should let this user in")
